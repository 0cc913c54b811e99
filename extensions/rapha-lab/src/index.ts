import { blocked } from './blocked';
import { commands } from './commands';
import { hygiene } from './hygiene';
import { jobCard } from './jobcard';
import { marks } from './marks';
import { panel } from './panel';
import { release } from './release';
import { seals } from './seal';
import { sites } from './sites';
import { status } from './status';

export default [sites, marks, seals, blocked, release, jobCard, panel, status, commands, hygiene];
