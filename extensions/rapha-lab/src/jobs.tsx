import * as React from 'react';
import { Job } from './job';
import { isLive } from './model';
import { IJob } from './tokens';

interface IJobsProps {
  jobs: readonly IJob[];
  cancel: (job: IJob) => Promise<void>;
  showCell: (job: IJob) => void;
}

/** Jobs, the running ones first, then the newest; they live at their site, whatever the kernel does. */
export function Jobs({ jobs, cancel, showCell }: IJobsProps): JSX.Element {
  if (!jobs.length) {
    return <p className="rapha-Empty">No jobs yet.</p>;
  }
  const sorted = [...jobs].reverse().sort((a, b) => Number(isLive(b)) - Number(isLive(a)));
  return (
    <>
      {sorted.map(job => (
        <Item key={`${job.site} ${job.id}`} job={job} text={JSON.stringify(job)} cancel={cancel} showCell={showCell} />
      ))}
    </>
  );
}

type Item = Omit<IJobsProps, 'jobs'> & { job: IJob; text: string };

/** Drawn again only when the job itself has changed: a list of hundreds stays cheap. */
const Item = React.memo(
  ({ job, cancel, showCell }: Item) => <Job job={job} cancel={cancel} showCell={showCell} />,
  (before, after) => before.text === after.text
);
