import { LabIcon } from '@jupyterlab/ui-components';
import { epsilon } from './format';
import { checkedIcon, closedIcon, hereIcon } from './icons';
import { Verdict } from './verdict';

/** Show or cover one output, and say under it why. `node` is the output with its prompt. */
export function drawSeal(
  node: HTMLElement,
  verdict: Verdict,
  simulated: boolean,
  openReceipt: (() => void) | null
): void {
  const shown = JSON.stringify([verdict, simulated]);
  if (node.dataset.raphaShown === shown) {
    return;
  }
  node.dataset.raphaShown = shown;
  node.dataset.raphaSeal = verdict.state;
  node.querySelector(':scope > .rapha-Seal')?.remove();
  const seal = words(verdict, simulated, openReceipt);
  if (seal) {
    node.append(seal);
  }
}

function words(verdict: Verdict, simulated: boolean, openReceipt: (() => void) | null): HTMLElement | null {
  switch (verdict.state) {
    case 'verified': {
      const { signature, release } = verdict;
      const seal = strip(checkedIcon, `Signed by ${signature.site}`);
      if (simulated) {
        seal.append(text('span', 'simulated enclave', 'rapha-Chip rapha-mod-simulated'));
      }
      if (release) {
        seal.append(text('span', `ε ${epsilon(release.epsilon)}`));
      } else {
        seal.append(text('span', 'from the session, which holds no record'));
      }
      if (release?.receipt && openReceipt) {
        const button = text('button', `Receipt ${release.receipt.index}`, 'rapha-Button rapha-mod-plain');
        button.addEventListener('click', openReceipt);
        seal.append(button);
      }
      return seal;
    }
    case 'here':
      return strip(hereIcon, 'No answer of the site: an error, unsigned');
    case 'copy':
      return strip(hereIcon, 'A copy of a release; its seal stands in the enclave cell that made it');
    case 'pending':
      return strip(closedIcon, 'Checking the signature…');
    case 'covered': {
      const seal = strip(closedIcon, 'Output covered');
      seal.append(text('span', verdict.reason), text('span', 'Run the cell again to get the site’s own answer.'));
      seal.setAttribute('role', 'note');
      return seal;
    }
    default:
      return null;
  }
}

function strip(icon: LabIcon, title: string): HTMLElement {
  const seal = document.createElement('div');
  seal.className = 'rapha-Seal';
  seal.append(icon.element({ tag: 'span', className: 'rapha-Seal-icon', width: '14px' }), text('strong', title));
  return seal;
}

function text(tag: 'span' | 'strong' | 'button', content: string, className = ''): HTMLElement {
  const node = document.createElement(tag);
  node.textContent = content;
  node.className = className;
  return node;
}
