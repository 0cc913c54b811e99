import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import * as React from 'react';
import { addCard } from './card';
import { Job } from './job';
import { isLive } from './model';
import { IJob, ISites, Mime } from './tokens';
import { useSites } from './usesites';

/** Draws a job in its cell: live from the server extension, or else its last saved state. */
export const jobCard: JupyterFrontEndPlugin<void> = {
  id: 'rapha-lab:job',
  description: 'Draws a job, live for as long as its site knows it.',
  autoStart: true,
  requires: [IRenderMimeRegistry, ISites],
  activate: (_: JupyterFrontEnd, registry: IRenderMimeRegistry, sites: ISites) => {
    addCard<IJob>(registry, Mime.job, saved => <JobCard saved={saved} sites={sites} />);
  }
};

function JobCard({ saved, sites }: { saved: IJob; sites: ISites }): JSX.Element {
  useSites(sites);
  const known = sites.job(saved.site, saved.id);
  const job = known ?? saved;
  const here = known || !sites.ready || job.state === 'rehearsing';
  const note = isLive(job) ? sites.problem ?? 'The site does not list this job now.' : '';
  return (
    <section className="rapha-Card">
      <Job
        job={job}
        cancel={known && (asked => sites.cancel(asked))}
        note={here ? undefined : `Last state saved in this notebook. ${note}`}
      />
    </section>
  );
}
