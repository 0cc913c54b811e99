import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { CodeCell } from '@jupyterlab/cells';
import { INotebookTracker } from '@jupyterlab/notebook';
import { IEnclaveCell, parse } from './enclave';
import { enclaveIcon } from './icons';
import { ISite, ISites } from './tokens';
import { onEveryCodeCell } from './watch';

export const ENCLAVE_CLASS = 'rapha-Enclave';

/** Marks the cells that run at a site, as their first line is typed. */
export const marks: JupyterFrontEndPlugin<void> = {
  id: 'rapha-lab:marks',
  description: 'Marks the cells that run at a site, and says which, and what they ask for.',
  autoStart: true,
  requires: [INotebookTracker, ISites],
  activate: (_: JupyterFrontEnd, tracker: INotebookTracker, sites: ISites) => {
    onEveryCodeCell(tracker, cell => new Mark(cell, sites));
  }
};

/** The strip over one enclave cell: dataset, site, simulated or not, ε asked for. */
class Mark {
  constructor(
    private _cell: CodeCell,
    private _sites: ISites
  ) {
    this._strip.className = 'rapha-Strip';
    const update = () => this.update();
    _cell.model.contentChanged.connect(update);
    _sites.stateChanged.connect(update);
    _cell.disposed.connect(() => _sites.stateChanged.disconnect(update));
    this.update();
  }

  update(): void {
    const request = parse(this._cell.model.sharedModel.source);
    this._cell.toggleClass(ENCLAVE_CLASS, request !== null);
    const site = request ? this._sites.holding(request.dataset)[0] : undefined;
    const shown = JSON.stringify([request, site?.name, site?.simulated, site?.alive]);
    if (shown === this._shown) {
      return;
    }
    this._shown = shown;
    this._strip.remove();
    if (request) {
      draw(this._strip, request, site);
      this._cell.node.querySelector('.jp-CellHeader')?.append(this._strip);
    }
  }

  private _strip = document.createElement('div');
  private _shown = 'null';
}

function draw(strip: HTMLElement, request: IEnclaveCell, site: ISite | undefined): void {
  const dataset = request.dataset || 'no dataset named';
  const where = !site ? 'no connected site has it' : site.alive ? `at ${site.name}` : `${site.name} does not answer`;
  strip.replaceChildren(
    enclaveIcon.element({ tag: 'span', className: 'rapha-Strip-icon', width: '14px' }),
    piece('rapha-Strip-dataset', dataset),
    piece('rapha-Strip-site', where)
  );
  strip.dataset.simulated = String(Boolean(site?.simulated));
  if (site?.simulated) {
    const chip = piece('rapha-Chip rapha-mod-simulated', 'simulated enclave');
    chip.title = 'No hardware protects this enclave from the owner of the machine it runs on.';
    strip.append(chip);
  }
  const asked = price(request);
  if (asked) {
    const chip = piece('rapha-Strip-price', `asks ε ${asked}`);
    chip.title = 'Read from the text of the cell. What is charged is what runs, as the site prices it.';
    strip.append(chip);
  }
}

function price(request: IEnclaveCell): string {
  return [request.epsilon, ...request.asked].filter(Boolean).join(' + ');
}

function piece(className: string, text: string): HTMLElement {
  const span = document.createElement('span');
  span.className = className;
  span.textContent = text;
  return span;
}
