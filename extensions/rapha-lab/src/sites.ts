import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { NotebookActions } from '@jupyterlab/notebook';
import { isEnclave } from './enclave';
import { SitesModel } from './model';
import { ISites } from './tokens';

/** Keeps what this machine knows of sites and jobs, for every other part. */
export const sites: JupyterFrontEndPlugin<ISites> = {
  id: 'rapha-lab:sites',
  description: 'Keeps what is known of sites and jobs.',
  autoStart: true,
  provides: ISites,
  activate: (app: JupyterFrontEnd) => {
    const model = new SitesModel(app.serviceManager.serverSettings);
    NotebookActions.executed.connect((_, { cell }) => {
      const source = cell.model.sharedModel.source;
      if (isEnclave(source) || source.includes('connect(')) {
        void model.refresh();
      }
    });
    return model;
  }
};
