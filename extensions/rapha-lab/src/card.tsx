import { ReactWidget } from '@jupyterlab/ui-components';
import { IRenderMime } from '@jupyterlab/rendermime-interfaces';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import * as React from 'react';

/** Draws one MIME type of ours with a React component; text only, nothing of it is markup. */
export class Card<T> extends ReactWidget implements IRenderMime.IRenderer {
  constructor(
    private _mime: string,
    private _view: (data: T) => JSX.Element
  ) {
    super();
    this.addClass('rapha-Output');
  }

  async renderModel(model: IRenderMime.IMimeModel): Promise<void> {
    this._data = model.data[this._mime] as unknown as T;
    this.update();
    await this.renderPromise;
  }

  protected render(): JSX.Element {
    return this._data && typeof this._data === 'object' ? this._view(this._data) : <></>;
  }

  private _data: T | null = null;
}

/** Let `view` draw `mime`, before any fallback in the same bundle. */
export function addCard<T>(
  registry: IRenderMimeRegistry,
  mime: string,
  view: (data: T) => JSX.Element
): void {
  registry.addFactory(
    { safe: true, mimeTypes: [mime], createRenderer: () => new Card<T>(mime, view) },
    0
  );
}
