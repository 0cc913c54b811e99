import { IOutputModel } from '@jupyterlab/rendermime';
import { ServerConnection } from '@jupyterlab/services';
import { request } from './api';
import { IRelease, ISignature, IVerification, Mime } from './tokens';

/**
 * What may be shown of an output, and what is said of it.
 *
 * - `verified`: signed by the site; shown.
 * - `here`: an error or refusal, most often of the rehearsal; shown, and said to be no answer of the site.
 * - `card`: a card that states its own source; shown.
 * - `said`: the error whose card stands just above and says the same; not shown again.
 * - `copy`: a release outside an enclave cell; shown, and said to be unchecked.
 * - `pending`, `covered`: not shown.
 */
export type Verdict =
  | { state: 'pending' | 'here' | 'card' | 'said' | 'copy' }
  | { state: 'covered'; reason: string }
  | { state: 'verified'; signature: ISignature; release: IRelease | null };

const UNSIGNED = 'It carries no signature of a site, so it may have been edited, pasted or printed on this computer.';
const MOVED = 'Its signature belongs to another cell.';

export function signatureOf(output: IOutputModel): ISignature | null {
  const signature = output.metadata['rapha'] as unknown as ISignature | undefined;
  return signature && typeof signature === 'object' ? signature : null;
}

/** What can be said of an output in `cell` before its signature is checked; null if the signature decides. */
export function atFirstSight(output: IOutputModel, cell: string, enclave: boolean): Verdict | null {
  const { data, type } = output;
  const signature = signatureOf(output);
  const release = Mime.release in data;
  if (signature) {
    const elsewhere = enclave && signature.cell && signature.cell !== cell;
    return elsewhere ? { state: 'covered', reason: MOVED } : null;
  }
  if (!enclave) {
    return release ? { state: 'copy' } : { state: 'card' };
  }
  if (release) {
    return { state: 'covered', reason: UNSIGNED };
  }
  if (Mime.job in data) {
    return { state: 'card' };
  }
  const usage = String(data['application/vnd.jupyter.stderr'] ?? '').startsWith('UsageError:');
  if (type === 'error' || usage || Mime.blocked in data) {
    return { state: 'here' };
  }
  return { state: 'covered', reason: UNSIGNED };
}

/** Ask the server extension whether a signature holds; whatever goes wrong, the answer is no. */
export async function check(output: IOutputModel, settings: ServerConnection.ISettings): Promise<Verdict> {
  const { data, metadata } = output.toJSON() as { data?: object; metadata?: object };
  try {
    const answer = await request<IVerification>(settings, 'verify', { data, metadata });
    if (answer.verified !== true) {
      return { state: 'covered', reason: answer.reason || 'Its signature does not hold.' };
    }
  } catch (error) {
    return { state: 'covered', reason: `It could not be checked. ${(error as Error).message}` };
  }
  const release = (output.data[Mime.release] as unknown as IRelease) ?? null;
  return { state: 'verified', signature: signatureOf(output)!, release };
}
