import * as React from 'react';
import { duration, epsilon } from './format';
import { isLive } from './model';
import { IJob } from './tokens';

const WORDS: Record<string, string> = {
  queued: 'Queued',
  rehearsing: 'Rehearsing on mock patients',
  running: 'Running',
  waiting: 'Waits for approval',
  done: 'Done',
  failed: 'Failed',
  cancelled: 'Cancelled',
  lost: 'Lost: the site no longer knows it'
};

export interface IJobProps {
  job: IJob;
  /** Absent where nothing can be cancelled: a saved state, a site that is gone. */
  cancel?: (job: IJob) => Promise<void>;
  showCell?: (job: IJob) => void;
  /** What to say of where these figures come from, if not from the site just now. */
  note?: string;
}

/** One job: where it runs, how far it is, what it has spent of what it was granted. */
export function Job({ job, cancel, showCell, note }: IJobProps): JSX.Element {
  const [asked, ask] = React.useState(false);
  const [refused, refuse] = React.useState('');
  const live = isLive(job);
  const stop = () => {
    ask(true);
    cancel!(job).catch(error => {
      ask(false);
      refuse(error.message);
    });
  };
  return (
    <article className="rapha-Job" data-state={job.state} aria-label={`Job ${job.id}`}>
      <header className="rapha-Card-head">
        <span className={`rapha-State rapha-mod-${job.state}`}>{WORDS[job.state] ?? job.state}</span>
        <span className="rapha-Job-where">
          {job.dataset} at {job.site}
        </span>
        {job.simulated && <span className="rapha-Chip rapha-mod-simulated">simulated enclave</span>}
      </header>
      {job.source_line && <code className="rapha-Job-source">{job.source_line}</code>}
      <Progress job={job} />
      <Figures job={job} />
      {job.state === 'waiting' && <Waits waits={job.waits} />}
      {note && <p className="rapha-Note">{note}</p>}
      {refused && (
        <p className="rapha-Note" role="alert">
          {refused}
        </p>
      )}
      <footer className="rapha-Job-foot">
        {live && cancel && (
          <button className="rapha-Button" onClick={stop} disabled={asked}>
            {asked ? 'Cancelling…' : 'Cancel'}
          </button>
        )}
        {job.origin?.cell && showCell && (
          <button className="rapha-Button rapha-mod-plain" onClick={() => showCell(job)}>
            Show its cell
          </button>
        )}
        <span className="rapha-Job-id" title={job.id}>
          {job.id.slice(0, 8)}
        </span>
      </footer>
    </article>
  );
}

/** Who is waited for, and the name under which they find it. */
function Waits({ waits }: Pick<IJob, 'waits'>): JSX.Element {
  return (
    <p className="rapha-Note">
      {waits?.what ?? 'A custodian has yet to decide.'}{' '}
      {waits?.field && <code title={waits.field}>{waits.field.slice(0, 12)}</code>}
    </p>
  );
}

function Progress({ job }: { job: IJob }): JSX.Element | null {
  if (!job.steps || job.step === null) {
    return null;
  }
  const share = Math.min(1, job.step / job.steps);
  return (
    <div
      className="rapha-Bar"
      role="progressbar"
      aria-label={`Steps of job ${job.id}`}
      aria-valuemin={0}
      aria-valuemax={job.steps}
      aria-valuenow={job.step}
    >
      <div className="rapha-Bar-fill" style={{ width: `${100 * share}%` }} />
    </div>
  );
}

function Figures({ job }: { job: IJob }): JSX.Element {
  const figures: string[] = [];
  if (isLive(job) && job.doing) {
    figures.push(job.doing);
  }
  if (job.steps && job.step !== null) {
    figures.push(`step ${job.step} of ${job.steps}`);
  }
  if (job.epsilon !== null && job.epsilon !== undefined) {
    figures.push(`ε ${epsilon(job.spent ?? 0)} spent of ${epsilon(job.epsilon)} granted`);
  }
  if (isLive(job) && !job.doing && typeof job.seconds_left === 'number') {
    figures.push(`about ${duration(job.seconds_left)} left`);
  }
  return (
    <p className="rapha-Job-figures">
      {figures.map(figure => (
        <span key={figure}>{figure}</span>
      ))}
    </p>
  );
}
