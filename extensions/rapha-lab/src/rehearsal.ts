import { JupyterFrontEnd } from '@jupyterlab/application';
import { ISessionContext, MainAreaWidget } from '@jupyterlab/apputils';
import { OutputAreaModel, SimplifiedOutputArea } from '@jupyterlab/outputarea';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import { Panel, Widget } from '@lumino/widgets';
import { mockIcon } from './icons';

const ID = 'rapha-lab-rehearsal';

/** A panel under the notebook for what a cell does on mock patients; it never stands in the notebook. */
export class Rehearsal {
  constructor(
    private _app: JupyterFrontEnd,
    private _rendermime: IRenderMimeRegistry
  ) {}

  /** Run `code` in the kernel, and show what it says. */
  async run(code: string, session: ISessionContext): Promise<void> {
    const area = this._open();
    await SimplifiedOutputArea.execute(code, area, session);
  }

  private _open(): SimplifiedOutputArea {
    this._area?.dispose();
    this._area = new SimplifiedOutputArea({
      model: new OutputAreaModel({ trusted: true }),
      rendermime: this._rendermime
    });
    if (!this._widget || this._widget.isDisposed) {
      this._widget = frame();
      this._app.shell.add(this._widget, 'main', { mode: 'split-bottom', activate: false });
    }
    this._widget.content.addWidget(this._area);
    return this._area;
  }

  private _area: SimplifiedOutputArea | null = null;
  private _widget: MainAreaWidget<Panel> | null = null;
}

function frame(): MainAreaWidget<Panel> {
  const content = new Panel();
  content.addClass('rapha-Rehearsal');
  const note = new Widget();
  note.addClass('rapha-Note');
  note.node.textContent =
    'Mock patients, drawn from the schema alone, in this notebook’s kernel. Nothing was sent and nothing spent; the numbers mean nothing.';
  content.addWidget(note);
  const widget = new MainAreaWidget({ content });
  widget.id = ID;
  widget.title.label = 'Mock patients';
  widget.title.icon = mockIcon;
  widget.title.closable = true;
  return widget;
}
