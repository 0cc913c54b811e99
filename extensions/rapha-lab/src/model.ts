import { VDomModel } from '@jupyterlab/ui-components';
import { ServerConnection } from '@jupyterlab/services';
import { Poll } from '@lumino/polling';
import { request } from './api';
import { IJob, ISite, ISites } from './tokens';

const SECOND = 1000;
const LIVE = new Set(['queued', 'rehearsing', 'running', 'waiting']);

/** Whether a job can still change. */
export function isLive(job: IJob): boolean {
  return LIVE.has(job.state);
}

/** Keeps what the server extension says of sites and jobs; faster while a job runs. */
export class SitesModel extends VDomModel implements ISites {
  constructor(private _settings: ServerConnection.ISettings) {
    super();
    this._sitesPoll = this._poll('sites', 15 * SECOND, () => this._loadSites());
    this._jobsPoll = this._poll('jobs', 10 * SECOND, () => this._loadJobs());
  }

  get sites(): readonly ISite[] {
    return this._sites;
  }

  get jobs(): readonly IJob[] {
    return this._jobs;
  }

  get problem(): string | null {
    return this._problem;
  }

  get ready(): boolean {
    return this._ready;
  }

  holding(dataset: string): ISite[] {
    const found = this._sites.filter(site => site.datasets.some(({ name }) => name === dataset));
    return found.sort((a, b) => Number(b.alive) - Number(a.alive));
  }

  job(site: string, id: string): IJob | undefined {
    return this._jobs.find(job => job.site === site && job.id === id);
  }

  async cancel(job: IJob): Promise<void> {
    const path = ['jobs', job.site, job.id].map(encodeURIComponent).join('/');
    await request(this._settings, `${path}/cancel`, {});
    await this._jobsPoll.refresh();
  }

  async refresh(): Promise<void> {
    await Promise.all([this._sitesPoll.refresh(), this._jobsPoll.refresh()]);
  }

  dispose(): void {
    this._sitesPoll.dispose();
    this._jobsPoll.dispose();
    super.dispose();
  }

  private _poll(name: string, interval: number, factory: () => Promise<void>): Poll {
    return new Poll({
      name: `rapha-lab:${name}`,
      factory,
      frequency: { interval, backoff: true, max: 60 * SECOND },
      standby: 'when-hidden'
    });
  }

  private async _loadSites(): Promise<void> {
    await this._load('sites', (sites: ISite[]) => {
      this._sites = sites;
    });
  }

  private async _loadJobs(): Promise<void> {
    await this._load('jobs', (jobs: IJob[]) => {
      this._jobs = jobs;
    });
    const interval = this._jobs.some(isLive) ? SECOND : 10 * SECOND;
    if (this._jobsPoll.frequency.interval !== interval) {
      this._jobsPoll.frequency = { ...this._jobsPoll.frequency, interval };
    }
  }

  private async _load<T>(path: string, keep: (answer: T) => void): Promise<void> {
    let problem: string | null = null;
    let text = this._seen.get(path);
    try {
      const answer = await request<T>(this._settings, path);
      text = JSON.stringify(answer);
      keep(answer);
    } catch (error) {
      problem = (error as Error).message;
      throw error;
    } finally {
      if (text !== this._seen.get(path) || problem !== this._problem || !this._ready) {
        this._seen.set(path, text ?? '');
        this._problem = problem;
        this._ready = true;
        this.stateChanged.emit();
      }
    }
  }

  private _sites: ISite[] = [];
  private _jobs: IJob[] = [];
  private _problem: string | null = null;
  private _ready = false;
  private _seen = new Map<string, string>();
  private _sitesPoll: Poll;
  private _jobsPoll: Poll;
}
