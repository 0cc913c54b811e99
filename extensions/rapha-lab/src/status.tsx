import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { INotebookTracker } from '@jupyterlab/notebook';
import { IStatusBar, TextItem } from '@jupyterlab/statusbar';
import { ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';
import { parse } from './enclave';
import { epsilon } from './format';
import { CommandIDs, ISites } from './tokens';
import { useSites } from './usesites';

/** Says in the status bar what is left of the budget of the notebook's dataset. */
export const status: JupyterFrontEndPlugin<void> = {
  id: 'rapha-lab:status',
  description: 'Shows the budget left for the dataset of the notebook.',
  autoStart: true,
  requires: [INotebookTracker, ISites],
  optional: [IStatusBar],
  activate: (app: JupyterFrontEnd, tracker: INotebookTracker, sites: ISites, bar: IStatusBar | null) => {
    const open = () => void app.commands.execute(CommandIDs.openPanel);
    const item = ReactWidget.create(<Left tracker={tracker} sites={sites} open={open} />);
    item.addClass('rapha-Status');
    bar?.registerStatusItem('rapha-lab:status', { item, align: 'left', rank: 50 });
  }
};

function Left(props: { tracker: INotebookTracker; sites: ISites; open: () => void }): JSX.Element {
  const { tracker, sites, open } = props;
  useSites(sites);
  const [dataset, setDataset] = React.useState('');
  React.useEffect(() => {
    const update = () => setDataset(datasetOf(tracker));
    update();
    tracker.currentChanged.connect(update);
    tracker.activeCellChanged.connect(update);
    sites.stateChanged.connect(update);
    return () => {
      tracker.currentChanged.disconnect(update);
      tracker.activeCellChanged.disconnect(update);
      sites.stateChanged.disconnect(update);
    };
  }, [tracker, sites]);
  const left = describe(sites, dataset);
  return left ? (
    <button className="rapha-Status-button" onClick={open} title={left.all} aria-label={left.all}>
      <TextItem source={left.short} />
    </button>
  ) : (
    <></>
  );
}

/** The dataset of the active cell, or else of the notebook's last enclave cell. */
function datasetOf(tracker: INotebookTracker): string {
  const own = tracker.activeCell && parse(tracker.activeCell.model.sharedModel.source);
  if (own?.dataset) {
    return own.dataset;
  }
  const cells = tracker.currentWidget?.content.widgets ?? [];
  const found = [...cells].reverse().map(cell => parse(cell.model.sharedModel.source)?.dataset);
  return found.find(Boolean) ?? '';
}

/** The smallest budget left, and all of them in words. */
function describe(sites: ISites, name: string): { short: string; all: string } | null {
  const site = sites.holding(name)[0];
  const dataset = site?.datasets.find(dataset => dataset.name === name);
  const budgets = Object.entries(dataset?.budget ?? {}).flatMap(([project, splits]) =>
    Object.entries(splits).map(([split, { left }]) => ({ project, split, left: Math.max(0, left) }))
  );
  if (!budgets.length) {
    return null;
  }
  const least = budgets.reduce((a, b) => (b.left < a.left ? b : a));
  const all = budgets.map(({ project, split, left }) => `${project}, ${split}: ε ${epsilon(left, 'down')}`);
  return {
    short: `${name}: ε ${epsilon(least.left, 'down')} left (${least.split})`,
    all: `Privacy budget left for ${name} at ${site.name}. ${all.join('; ')}`
  };
}
