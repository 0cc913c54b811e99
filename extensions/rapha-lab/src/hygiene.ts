import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Notification } from '@jupyterlab/apputils';
import { CodeCell } from '@jupyterlab/cells';
import { INotebookTracker, NotebookPanel } from '@jupyterlab/notebook';
import { ServerConnection } from '@jupyterlab/services';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { Debouncer } from '@lumino/polling';
import { request } from './api';
import { CommandIDs, IFinding, PLUGIN } from './tokens';

const EXPORTS = new Set(['notebook:export-to-format', 'docmanager:download', 'filebrowser:download']);

/** Warns of outputs that look like patients' rows: when they appear, and on saving or exporting. Help, not a wall. */
export const hygiene: JupyterFrontEndPlugin<void> = {
  id: 'rapha-lab:hygiene',
  description: 'Warns of outputs that look like patients’ rows before they are saved or exported.',
  autoStart: true,
  requires: [INotebookTracker],
  optional: [ISettingRegistry],
  activate: async (app: JupyterFrontEnd, tracker: INotebookTracker, registry: ISettingRegistry | null) => {
    const settings = await registry?.load(PLUGIN).catch(() => null);
    const wanted = () => settings?.get('warnOfRows').composite !== false;
    const checks = new WeakMap<NotebookPanel, OutputCheck>();
    const follow = (panel: NotebookPanel) => {
      const check = new OutputCheck(app, panel, wanted);
      checks.set(panel, check);
    };
    tracker.forEach(follow);
    tracker.widgetAdded.connect((_, panel) => follow(panel));
    const check = async () => checks.get(tracker.currentWidget!)?.check(true);
    app.commands.addCommand(CommandIDs.checkOutputs, {
      label: 'Check Outputs for Patients’ Rows',
      describedBy: { args: {} },
      isEnabled: () => tracker.currentWidget !== null,
      execute: async () => {
        if ((await check())?.length === 0) {
          Notification.info('No output here looks like patients’ rows. This check is help, not proof.', {
            autoClose: 6000
          });
        }
      }
    });
    app.commands.commandExecuted.connect((_, { id }) => {
      if (EXPORTS.has(id) && wanted()) {
        void check();
      }
    });
  }
};

/** The check of one notebook; it marks what it finds, and warns once for each set of findings. */
class OutputCheck {
  constructor(
    private _app: JupyterFrontEnd,
    private _panel: NotebookPanel,
    private _wanted: () => boolean
  ) {
    this._settings = _app.serviceManager.serverSettings;
    const soon = new Debouncer(async () => {
      if (!this._panel.isDisposed && this._wanted()) {
        await this.check(false);
      }
    }, 800);
    _panel.context.saveState.connect((_, state) => {
      if (state === 'started' && this._wanted()) {
        void this.check(true);
      }
    });
    const later = () => void soon.invoke().catch(() => undefined);
    _panel.context.model.contentChanged.connect(later);
    _panel.disposed.connect(() => Notification.dismiss(this._toast));
    void _panel.context.ready.then(later);
  }

  /** What looks like rows; with `warn`, say so. */
  async check(warn: boolean): Promise<IFinding[]> {
    const cells = this._panel.content.widgets.map(({ model }) => model.toJSON());
    const text = JSON.stringify(cells, (key, value) => (key === 'metadata' ? undefined : value));
    if (text !== this._text) {
      this._text = text;
      this._findings = await request<IFinding[]>(this._settings, 'check', { cells }).catch(() => []);
    }
    this._mark();
    if (warn && this._findings.length) {
      this._warn();
    }
    return this._findings;
  }

  private _mark(): void {
    for (const cell of this._panel.content.widgets) {
      const found = this._findings.find(({ cell: id }) => id === cell.model.id);
      cell.toggleClass('rapha-mod-rows', Boolean(found));
      if (found && cell instanceof CodeCell) {
        cell.outputArea.node.dataset.raphaRows = `This looks like patients’ rows: ${found.reason}`;
      }
    }
  }

  private _warn(): void {
    const places = this._findings.map(({ cell, index }) => `${cell} ${index}`).join();
    if (places === this._warned) {
      return;
    }
    this._warned = places;
    const count = this._findings.length;
    const outputs = count === 1 ? 'An output' : `${count} outputs`;
    const { cell, reason } = this._findings[0];
    this._toast = Notification.warning(
      // Lab cuts a toast after 140 characters.
      `${outputs} may hold patients’ rows: ${reason} This is help, not a wall.`,
      {
        autoClose: false,
        actions: [
          { label: 'Show', callback: () => void this._app.commands.execute(CommandIDs.showCell, { cell }) },
          { label: 'Clear those outputs', callback: () => this._clear() }
        ]
      }
    );
  }

  private _clear(): void {
    for (const { model } of this._panel.content.widgets) {
      if (model.type === 'code' && this._findings.some(({ cell }) => cell === model.id)) {
        (model as CodeCell['model']).clearExecution();
      }
    }
  }

  private _settings: ServerConnection.ISettings;
  private _findings: IFinding[] = [];
  private _text = '';
  private _warned = '';
  private _toast = 'none yet';
}
