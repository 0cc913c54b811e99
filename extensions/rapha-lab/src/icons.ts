import { LabIcon } from '@jupyterlab/ui-components';

const draw = (name: string, path: string): LabIcon =>
  new LabIcon({
    name: `rapha-lab:${name}`,
    svgstr: `<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24"><path class="jp-icon3" fill="#616161" d="${path}"/></svg>`
  });

/** A shield with a cross: the enclave at the hospital. */
export const enclaveIcon = draw(
  'enclave',
  'M12 1.5 3.5 5v6.2c0 5.3 3.6 10 8.5 11.3 4.9-1.3 8.5-6 8.5-11.3V5L12 1.5zm0 2.2 6.5 2.7v4.8c0 4.2-2.7 8-6.5 9.2-3.8-1.2-6.5-5-6.5-9.2V6.4L12 3.7zM10.9 7.6v3.3H7.6v2.2h3.3v3.3h2.2v-3.3h3.3v-2.2h-3.3V7.6z'
);

/** A flask: made-up patients, here. */
export const mockIcon = draw(
  'mock',
  'M9 2v2h1v5.3L4.6 18.6A2.3 2.3 0 0 0 6.6 22h10.8a2.3 2.3 0 0 0 2-3.4L14 9.3V4h1V2H9zm3 2v5.8l2.5 4.2h-5L12 9.8V4zm-3.7 12h7.4l2 3.6a.3.3 0 0 1-.3.4H6.6a.3.3 0 0 1-.3-.4L8.3 16z'
);

/** A shield with an arrow: send to the site. */
export const runIcon = draw(
  'run',
  'M12 1.5 3.5 5v6.2c0 5.3 3.6 10 8.5 11.3 4.9-1.3 8.5-6 8.5-11.3V5L12 1.5zm0 2.2 6.5 2.7v4.8c0 4.2-2.7 8-6.5 9.2-3.8-1.2-6.5-5-6.5-9.2V6.4L12 3.7zM9.5 7.5v9l7-4.5z'
);

/** A tick: checked. */
export const checkedIcon = draw('checked', 'M9 16.2 4.8 12l-1.4 1.4L9 19 21 7l-1.4-1.4z');

/** A padlock: refused or covered. */
export const closedIcon = draw(
  'closed',
  'M12 2a5 5 0 0 0-5 5v3H5.5v12h13V10H17V7a5 5 0 0 0-5-5zm-3 5a3 3 0 0 1 6 0v3H9V7zm3 7a1.7 1.7 0 0 1 .9 3.1V19h-1.8v-1.9A1.7 1.7 0 0 1 12 14z'
);

/** A monitor: this computer. */
export const hereIcon = draw('here', 'M3 4h18v12h-7v2h3v2H7v-2h3v-2H3V4zm2 2v8h14V6H5z');
