import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { CodeCell } from '@jupyterlab/cells';
import { INotebookTracker } from '@jupyterlab/notebook';
import { IOutputModel } from '@jupyterlab/rendermime';
import { ServerConnection } from '@jupyterlab/services';
import { isEnclave } from './enclave';
import { showReceipt } from './receipt';
import { drawSeal } from './sealview';
import { ISites, Mime } from './tokens';
import { atFirstSight, check, Verdict } from './verdict';
import { onEveryCodeCell } from './watch';

const SAID: Verdict = { state: 'said' };
const SEALED = new WeakMap<CodeCell, CellSeals>();

/** Seals what a site signed, and covers whatever else stands in an enclave cell. */
export const seals: JupyterFrontEndPlugin<void> = {
  id: 'rapha-lab:seals',
  description: 'Checks the signature of every output of an enclave cell; covers those that have none.',
  autoStart: true,
  requires: [INotebookTracker, ISites],
  activate: (app: JupyterFrontEnd, tracker: INotebookTracker, sites: ISites) => {
    const settings = app.serviceManager.serverSettings;
    onEveryCodeCell(tracker, cell => SEALED.set(cell, new CellSeals(cell, sites, settings)));
  }
};

/** The last verified release of a cell, or null. */
export function lastRelease(cell: CodeCell): Extract<Verdict, { state: 'verified' }> | null {
  return SEALED.get(cell)?.last() ?? null;
}

/** Whether an output is the error of the refusal whose card stands before it. */
function isSaid(output: IOutputModel, before: IOutputModel): boolean {
  return output.type === 'error' && Mime.blocked in before.data;
}

/** The seals of one cell's outputs, kept in step with the outputs and with the cell's first line. */
class CellSeals {
  constructor(
    private _cell: CodeCell,
    private _sites: ISites,
    private _settings: ServerConnection.ISettings
  ) {
    const update = () => this.update();
    const outputs = _cell.outputArea.model;
    outputs.changed.connect(update);
    outputs.stateChanged.connect(update);
    _cell.model.contentChanged.connect(this._onEdit, this);
    _sites.stateChanged.connect(update);
    _cell.disposed.connect(() => _sites.stateChanged.disconnect(update));
    this._enclave = isEnclave(_cell.model.sharedModel.source);
    this.update();
  }

  update(): void {
    const { model, widgets } = this._cell.outputArea;
    const seen = new Set<string>();
    for (let index = 0; index < Math.min(model.length, widgets.length); index++) {
      const output = model.get(index);
      const said = index > 0 && isSaid(output, model.get(index - 1));
      const verdict = said ? SAID : this._once(this._judge(output), seen);
      const open = verdict.state === 'verified' && verdict.release ? () => void showReceipt(verdict) : null;
      const simulated = verdict.state === 'verified' && this._simulated(verdict.signature.site);
      drawSeal(widgets[index].node, verdict, simulated, open);
    }
  }

  last(): Extract<Verdict, { state: 'verified' }> | null {
    const { model } = this._cell.outputArea;
    for (let index = model.length - 1; index >= 0; index--) {
      const verdict = this._checked.get(model.get(index));
      if (verdict?.state === 'verified' && verdict.release) {
        return verdict;
      }
    }
    return null;
  }

  private _onEdit(): void {
    const enclave = isEnclave(this._cell.model.sharedModel.source);
    if (enclave !== this._enclave) {
      this._enclave = enclave;
      this.update();
    }
  }

  private _judge(output: IOutputModel): Verdict {
    const first = atFirstSight(output, this._cell.model.id, this._enclave);
    if (first) {
      return first;
    }
    const known = this._checked.get(output);
    if (known) {
      return known;
    }
    this._checked.set(output, { state: 'pending' });
    void check(output, this._settings).then(verdict => {
      this._checked.set(output, verdict);
      if (!this._cell.isDisposed) {
        this.update();
      }
    });
    return { state: 'pending' };
  }

  /** One signed output stands in a cell once: its second copy is covered. */
  private _once(verdict: Verdict, seen: Set<string>): Verdict {
    if (verdict.state !== 'verified') {
      return verdict;
    }
    const { site, job, index } = verdict.signature;
    const place = `${site} ${job} ${index}`;
    if (seen.has(place)) {
      return { state: 'covered', reason: 'It is a second copy of an output that stands above.' };
    }
    seen.add(place);
    return verdict;
  }

  private _simulated(site: string): boolean {
    return this._sites.sites.some(({ name, simulated }) => name === site && simulated);
  }

  private _enclave: boolean;
  private _checked = new WeakMap<IOutputModel, Verdict>();
}

