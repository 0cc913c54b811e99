import { INotebookTracker, NotebookActions } from '@jupyterlab/notebook';

/** Put a new cell with this text below the cell that holds `from`, or below the active one, ready to edit. */
export function insertBelow(tracker: INotebookTracker, text: string, from: HTMLElement | null = null): void {
  const panel = from ? tracker.find(({ node }) => node.contains(from)) : tracker.currentWidget;
  if (!panel) {
    return;
  }
  const notebook = panel.content;
  const index = notebook.widgets.findIndex(cell => from && cell.node.contains(from));
  if (index >= 0) {
    notebook.activeCellIndex = index;
  }
  NotebookActions.insertBelow(notebook);
  NotebookActions.changeCellType(notebook, 'code');
  notebook.activeCell!.model.sharedModel.setSource(text);
  notebook.mode = 'edit';
  const end = notebook.activeCell!.editor;
  end?.focus();
  end?.setCursorPosition({ line: end.lineCount - 1, column: end.getLine(end.lineCount - 1)?.length ?? 0 });
}
