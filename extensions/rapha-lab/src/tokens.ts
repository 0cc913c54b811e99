import { Token } from '@lumino/coreutils';
import { ISignal } from '@lumino/signaling';

/** The privacy budget of one split of a dataset, for one project. */
export interface IBudget {
  epsilon: number;
  delta: number;
  spent: number;
  /** The budget less the guarantee of all answers together. */
  left: number;
  /** The largest ε of a single answer that is admitted next. */
  room?: number;
}

/** What the public schema says of one column. */
export interface IColumn {
  name: string;
  type: string;
  unit?: string;
  meaning?: string;
  bounds?: [number, number];
  categories?: string[];
}

export interface IDataset {
  name: string;
  title: string;
  schema: {
    patient: string;
    columns: IColumn[];
    tables?: { name: string; most: number; columns: IColumn[] }[];
  };
  budget: Record<string, Record<string, IBudget>>;
}

export interface ISite {
  name: string;
  url: string;
  simulated: boolean;
  verdict: { status: string; reasons: string[] };
  measurement: string;
  policy: { name: string; hash: string; signers: string[]; expires: string };
  /** The sandbox tier that was proved at start. */
  tier: string | null;
  alive: boolean;
  datasets: IDataset[];
}

export type JobState =
  | 'queued'
  | 'rehearsing'
  | 'running'
  | 'waiting'
  | 'done'
  | 'failed'
  | 'cancelled'
  | 'lost';

export interface IJob {
  id: string;
  site: string;
  dataset: string;
  /** The notebook cell it was sent from, as far as the kernel knew. */
  origin?: { cell?: string; notebook?: string };
  state: JobState;
  step: number | null;
  steps: number | null;
  /** What the job does before its steps, such as compiling them. */
  doing?: string | null;
  epsilon: number | null;
  spent: number | null;
  seconds_left: number | null;
  started: string | number | null;
  source_line?: string | null;
  /** What the job waits for, while it does. */
  waits?: { what?: string; why?: string; field?: string } | null;
  simulated: boolean;
}

/** A refusal: what happened, why, and what to ask instead. */
export interface IBlocked {
  what: string;
  why: string;
  instead: string;
  suggestion?: string | null;
  line?: number | null;
  kind?: string;
  /** What the rehearsal printed before. */
  said?: string;
}

export interface IReceipt {
  index: number;
  entry: unknown;
  proof: unknown;
  checkpoint: unknown;
}

/** What the curator released, with its error and its price. */
export interface IRelease {
  job: string;
  op: string;
  title: string;
  simulated?: boolean;
  rows: {
    name: string;
    value: number | string | null;
    error?: number | null;
    interval?: [number, number] | null;
  }[];
  epsilon: number;
  delta: number;
  unit: string;
  dataset: string;
  split: string;
  /** Whose patients were looked at and charged; not in a notebook of before. */
  splits?: string[];
  receipt?: IReceipt | null;
  site: string;
}

/** The signature under an output, as it stands in the output's metadata. */
export interface ISignature {
  site: string;
  key: string;
  job: string;
  /** The notebook cell that the job was sent from; empty if the kernel did not know. */
  cell: string;
  index: number;
  digest: string;
  signature: string;
}

export interface IVerification {
  verified: boolean;
  reason: string;
}

/** An output that looks like patients' rows. */
export interface IFinding {
  cell: string;
  index: number;
  reason: string;
}

/** What this machine knows of the sites and of the jobs that run there. */
export interface ISites {
  readonly sites: readonly ISite[];
  readonly jobs: readonly IJob[];
  /** Why the server extension does not answer, or null while it does. */
  readonly problem: string | null;
  /** Whether the first answer has come. */
  readonly ready: boolean;
  readonly stateChanged: ISignal<unknown, void>;
  /** The sites that hold a dataset of this name; the live ones first. */
  holding(dataset: string): ISite[];
  job(site: string, id: string): IJob | undefined;
  cancel(job: IJob): Promise<void>;
  refresh(): Promise<void>;
}

export const ISites = new Token<ISites>(
  'rapha-lab:ISites',
  'The sites known to this machine, their datasets and jobs.'
);

export const PLUGIN = 'rapha-lab:plugin';

export namespace Mime {
  export const blocked = 'application/vnd.rapha.blocked+json';
  export const release = 'application/vnd.rapha.release+json';
  export const job = 'application/vnd.rapha.job+json';
}

export namespace CommandIDs {
  export const runHere = 'rapha-lab:run-here';
  export const runAtSite = 'rapha-lab:run-at-site';
  export const runAll = 'rapha-lab:run-all';
  export const insertCell = 'rapha-lab:insert-cell';
  export const showReceipt = 'rapha-lab:show-receipt';
  export const showCell = 'rapha-lab:show-cell';
  export const openPanel = 'rapha-lab:open-panel';
  export const checkOutputs = 'rapha-lab:check-outputs';
}
