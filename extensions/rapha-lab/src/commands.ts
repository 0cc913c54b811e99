import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { Cell, CodeCell } from '@jupyterlab/cells';
import { PageConfig } from '@jupyterlab/coreutils';
import { INotebookTracker, NotebookActions, NotebookPanel } from '@jupyterlab/notebook';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import { CommandRegistry } from '@lumino/commands';
import { isEnclave, parse, withFlag } from './enclave';
import { enclaveIcon, mockIcon, runIcon } from './icons';
import { insertBelow } from './insert';
import { showReceipt } from './receipt';
import { Rehearsal } from './rehearsal';
import { lastRelease } from './seal';
import { CommandIDs, ISites, PLUGIN } from './tokens';

const CATEGORY = 'Rapha Lab';
const NO_ARGS = { describedBy: { args: {} } };

/** The commands behind palette, toolbar, menu and shortcuts; those are laid out in `schema/plugin.json`. */
export const commands: JupyterFrontEndPlugin<void> = {
  id: PLUGIN,
  description: 'Commands to run, rehearse and insert enclave cells, and to show receipts.',
  autoStart: true,
  requires: [INotebookTracker, ISites, IRenderMimeRegistry],
  optional: [ICommandPalette],
  activate: (
    app: JupyterFrontEnd,
    tracker: INotebookTracker,
    sites: ISites,
    rendermime: IRenderMimeRegistry,
    palette: ICommandPalette | null
  ) => {
    const rehearsal = new Rehearsal(app, rendermime);
    const add = (id: string, options: CommandRegistry.ICommandOptions) => {
      app.commands.addCommand(id, { ...NO_ARGS, ...options });
      palette?.addItem({ command: id, category: CATEGORY });
    };
    const inEnclaveCell = () => activeEnclaveCell(tracker) !== null;
    const inNotebook = () => tracker.currentWidget !== null;

    add(CommandIDs.runHere, {
      label: 'Run Here on Mock Patients',
      caption: 'Run the enclave cell in this kernel on made-up patients; nothing is sent, nothing spent',
      icon: mockIcon,
      isEnabled: inEnclaveCell,
      execute: () => {
        const cell = activeEnclaveCell(tracker)!;
        const code = withFlag(cell.model.sharedModel.source, '--rehearse-only');
        return rehearsal.run(code, tracker.currentWidget!.sessionContext);
      }
    });
    add(CommandIDs.runAtSite, {
      label: 'Run at the Site',
      caption: 'Run the enclave cell where the records are',
      icon: runIcon,
      isEnabled: inEnclaveCell,
      execute: () => run(tracker, [activeEnclaveCell(tracker)!])
    });
    add(CommandIDs.runAll, {
      label: 'Run All Enclave Cells',
      isEnabled: () => enclaveCells(tracker).length > 0,
      execute: () => run(tracker, enclaveCells(tracker))
    });
    add(CommandIDs.insertCell, {
      label: 'Insert Enclave Cell',
      caption: 'Insert a cell that runs where the records are',
      icon: enclaveIcon,
      isEnabled: inNotebook,
      execute: () => insertBelow(tracker, `%%enclave ${likelyDataset(tracker, sites)}\n`)
    });
    add(CommandIDs.showReceipt, {
      label: 'Show the Receipt of This Release',
      isEnabled: () => receiptOf(tracker) !== null,
      execute: () => showReceipt(receiptOf(tracker)!)
    });
    app.commands.addCommand(CommandIDs.showCell, {
      label: 'Show the Cell of a Job',
      describedBy: {
        args: { type: 'object', properties: { cell: { type: 'string' }, notebook: { type: 'string' } } }
      },
      execute: args => showCell(app, tracker, String(args.cell ?? ''), String(args.notebook ?? ''))
    });
    palette?.addItem({ command: CommandIDs.openPanel, category: CATEGORY });
    const refresh = () => app.commands.notifyCommandChanged();
    tracker.activeCellChanged.connect(refresh);
    sites.stateChanged.connect(refresh);
  }
};

function activeEnclaveCell(tracker: INotebookTracker): CodeCell | null {
  const cell = tracker.activeCell;
  return cell instanceof CodeCell && isEnclave(cell.model.sharedModel.source) ? cell : null;
}

function enclaveCells(tracker: INotebookTracker): Cell[] {
  const cells = tracker.currentWidget?.content.widgets ?? [];
  return cells.filter(cell => cell instanceof CodeCell && isEnclave(cell.model.sharedModel.source));
}

function receiptOf(tracker: INotebookTracker): ReturnType<typeof lastRelease> {
  return tracker.activeCell instanceof CodeCell ? lastRelease(tracker.activeCell) : null;
}

function run(tracker: INotebookTracker, cells: Cell[]): Promise<boolean> {
  const { content, sessionContext } = tracker.currentWidget!;
  return NotebookActions.runCells(content, cells, sessionContext);
}

/** The dataset of the nearest enclave cell above, or the only one that any site has. */
function likelyDataset(tracker: INotebookTracker, sites: ISites): string {
  const notebook = tracker.currentWidget!.content;
  const above = notebook.widgets.slice(0, notebook.activeCellIndex + 1).reverse();
  const near = above.map(cell => parse(cell.model.sharedModel.source)?.dataset).find(Boolean);
  const names = new Set(sites.sites.flatMap(site => site.datasets.map(({ name }) => name)));
  return near ?? (names.size === 1 ? [...names][0] : '');
}

/** Make a cell the active one; its notebook, a path on the server's disk, is opened if need be. */
async function showCell(
  app: JupyterFrontEnd,
  tracker: INotebookTracker,
  id: string,
  notebook: string
): Promise<void> {
  const find = () => tracker.find(({ content }) => content.widgets.some(cell => cell.model.id === id));
  // the server shortens the user's home to "~"
  const root = PageConfig.getOption('serverRoot').replace(/^~/, '').replace(/\/$/, '') + '/';
  const at = notebook.indexOf(root);
  if (!find() && at >= 0) {
    const path = notebook.slice(at + root.length);
    const opened = (await app.commands.execute('docmanager:open', { path })) as NotebookPanel | undefined;
    await opened?.revealed;
  }
  const panel = find();
  if (panel) {
    app.shell.activateById(panel.id);
    const index = panel.content.widgets.findIndex(cell => cell.model.id === id);
    panel.content.activeCellIndex = index;
    await panel.content.scrollToItem(index, 'center');
  }
}
