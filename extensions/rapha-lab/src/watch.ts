import { Cell, CodeCell } from '@jupyterlab/cells';
import { INotebookTracker, NotebookPanel } from '@jupyterlab/notebook';

/** Call `attach` once for every code cell of every notebook, as soon as the cell is drawn. */
export function onEveryCodeCell(
  tracker: INotebookTracker,
  attach: (cell: CodeCell, panel: NotebookPanel) => void
): void {
  const seen = new WeakSet<Cell>();
  const sweep = (panel: NotebookPanel) => {
    for (const cell of panel.content.widgets) {
      if (cell instanceof CodeCell && !seen.has(cell)) {
        seen.add(cell);
        void cell.ready.then(() => {
          if (!cell.isDisposed) {
            attach(cell, panel);
          }
        });
      }
    }
  };
  const follow = (panel: NotebookPanel) => {
    panel.content.model?.cells.changed.connect(() => sweep(panel));
    sweep(panel);
  };
  tracker.forEach(follow);
  tracker.widgetAdded.connect((_, panel) => {
    panel.content.modelChanged.connect(() => follow(panel));
    follow(panel);
  });
}
