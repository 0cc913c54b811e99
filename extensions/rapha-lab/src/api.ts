import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

/**
 * Ask the server extension.
 *
 * @throws Error with a sentence for the reader if it does not answer as it should.
 */
export async function request<T>(
  settings: ServerConnection.ISettings,
  path: string,
  body?: unknown
): Promise<T> {
  const url = URLExt.join(settings.baseUrl, 'rapha-lab', path);
  const init = body === undefined ? {} : { method: 'POST', body: JSON.stringify(body) };
  let response: Response;
  try {
    response = await ServerConnection.makeRequest(url, init, settings);
  } catch {
    throw new Error('The Jupyter server does not answer.');
  }
  if (response.status === 404) {
    throw new Error('The server extension of Rapha Lab is not running here.');
  }
  if (!response.ok) {
    const reply = await response.json().catch(() => ({}));
    throw new Error(reply.message || `The Jupyter server answered ${response.status}.`);
  }
  return (await response.json()) as T;
}
