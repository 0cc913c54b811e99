import { ILayoutRestorer, JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';
import { Datasets } from './datasets';
import { enclaveIcon } from './icons';
import { Jobs } from './jobs';
import { Sites } from './siteviews';
import { CommandIDs, IJob, ISites } from './tokens';
import { useSites } from './usesites';

const ID = 'rapha-lab-panel';

/** The sidebar: sites, datasets with their budgets, jobs; it needs no kernel. */
export const panel: JupyterFrontEndPlugin<void> = {
  id: 'rapha-lab:panel',
  description: 'Shows sites, datasets, budgets and jobs in the sidebar.',
  autoStart: true,
  requires: [ISites],
  optional: [ILayoutRestorer],
  activate: (app: JupyterFrontEnd, sites: ISites, restorer: ILayoutRestorer | null) => {
    const showCell = ({ origin }: IJob) => void app.commands.execute(CommandIDs.showCell, { ...origin });
    const widget = ReactWidget.create(<Panel sites={sites} showCell={showCell} />);
    widget.id = ID;
    widget.addClass('rapha-Panel');
    widget.title.icon = enclaveIcon;
    widget.title.caption = 'Rapha Lab: sites, budgets and jobs';
    widget.node.setAttribute('role', 'region');
    widget.node.setAttribute('aria-label', 'Rapha Lab');
    app.shell.add(widget, 'left', { rank: 600 });
    restorer?.add(widget, ID);
    app.commands.addCommand(CommandIDs.openPanel, {
      label: 'Show Sites, Budgets and Jobs',
      icon: enclaveIcon,
      describedBy: { args: {} },
      execute: () => app.shell.activateById(ID)
    });
  }
};

function Panel({ sites, showCell }: { sites: ISites; showCell: (job: IJob) => void }): JSX.Element {
  useSites(sites);
  const datasets = sites.sites.flatMap(site => site.datasets.map(dataset => ({ site, dataset })));
  const waiting = sites.jobs.filter(({ state }) => state === 'waiting');
  const jobs = sites.jobs.filter(({ state }) => state !== 'waiting');
  const cancel = (job: IJob) => sites.cancel(job);
  return (
    <div className="rapha-Panel-body">
      {sites.problem && (
        <p className="rapha-Note" role="alert">
          {sites.problem}
        </p>
      )}
      <Section title="Sites" count={sites.sites.length}>
        {sites.sites.length ? <Sites sites={sites.sites} /> : <NoSites ready={sites.ready} />}
      </Section>
      {datasets.length > 0 && (
        <Section title="Datasets" count={datasets.length}>
          <Datasets datasets={datasets} />
        </Section>
      )}
      {waiting.length > 0 && (
        <Section title="Approvals waited for" count={waiting.length}>
          <Jobs jobs={waiting} cancel={cancel} showCell={showCell} />
        </Section>
      )}
      <Section title="Jobs" count={jobs.length}>
        <Jobs jobs={jobs} cancel={cancel} showCell={showCell} />
      </Section>
    </div>
  );
}

function Section(props: { title: string; count: number; children: React.ReactNode }): JSX.Element {
  return (
    <details className="rapha-Section" open>
      <summary>
        <h2>{props.title}</h2>
        <span className="rapha-Section-count">{props.count}</span>
      </summary>
      {props.children}
    </details>
  );
}

function NoSites({ ready }: { ready: boolean }): JSX.Element {
  return ready ? (
    <p className="rapha-Empty">
      No site is known on this computer. In a cell: <code>rapha.connect("demo")</code>
    </p>
  ) : (
    <p className="rapha-Empty">Looking for sites…</p>
  );
}
