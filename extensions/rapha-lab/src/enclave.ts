/** What the first line of an enclave cell asks for, read from the cell's text alone. */
export interface IEnclaveCell {
  dataset: string;
  /** `--epsilon` of the line, as typed. */
  epsilon: string | null;
  /** The ε that stand as numbers in the body, as typed. */
  asked: string[];
}

const MARK = /^\s*%%enclave(?=\s|$)([^\n]*)/;
const ASKED = /\bepsilon\s*=\s*(\d[\d_.]*(?:[eE][+-]?\d+)?)/g;
const FLAGS = new Set(['--no-rehearsal', '--rehearse-only']);

/** Whether a cell's text is an enclave cell. */
export function isEnclave(source: string): boolean {
  return MARK.test(source);
}

/** The request of an enclave cell, or null if the cell is none. */
export function parse(source: string): IEnclaveCell | null {
  const mark = MARK.exec(source);
  if (!mark) {
    return null;
  }
  const cell: IEnclaveCell = { dataset: '', epsilon: null, asked: [] };
  const words = mark[1].trim().split(/\s+/).filter(Boolean);
  while (words.length) {
    const word = words.shift()!;
    const [flag, value] = word.split('=', 2);
    if (flag === '--epsilon') {
      cell.epsilon = value ?? words.shift() ?? null;
    } else if (word.startsWith('-')) {
      if (!FLAGS.has(word) && value === undefined) {
        words.shift();
      }
    } else if (!cell.dataset) {
      cell.dataset = word;
    }
  }
  const body = source.slice(mark[0].length).replace(/#[^\n]*/g, '');
  cell.asked = Array.from(body.matchAll(ASKED), match => match[1]);
  return cell;
}

/** The cell's text with a flag added to its first line. */
export function withFlag(source: string, flag: string): string {
  return source.replace(MARK, line => `${line.trimEnd()} ${flag}`);
}
