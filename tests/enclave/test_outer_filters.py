"""A site started by an ordinary user behind what containers put around it: the tier it reaches, and that it says so."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="module")
def python():
    """A Python that an ordinary user may run, with this project's packages."""
    version = f"python3.{sys.version_info.minor}"
    base = next((p for p in (f"/usr/bin/{version}", f"/usr/local/bin/{version}") if _runs(p)), None)
    if base is None or os.geteuid() != 0:
        pytest.skip("needs root, and a Python and packages that another user may read")
    folder = Path(
        tempfile.mkdtemp(prefix="rapha-outer-")
    )  # not pytest's own: its parents are closed to others
    subprocess.run([base, "-m", "venv", "--without-pip", folder], check=True)
    packages = folder / "lib" / version / "site-packages"
    (packages / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    folder.chmod(0o755)
    yield str(folder / "bin" / "python")
    shutil.rmtree(folder)


def _runs(python):
    command = [python, "-c", "import os, sys, venv; os.listdir(sys.argv[1])", sysconfig.get_path("purelib")]
    try:
        return subprocess.run(command, user=61000, capture_output=True).returncode == 0
    except OSError:
        return False


def behind(python, kind, *program):
    """What the program, run by an ordinary user behind that filter, prints last, as JSON."""
    environment = {"HOME": "/tmp", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [python, str(HERE / "outer.py"), kind, python, *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


PROBE = """
import json
from rapha_lab.enclave.sandbox import Zygote, probe
from rapha_lab.protocol.errors import SiteError
report = probe()
try:
    Zygote("rapha_lab.enclave._zygote:idle", (), bare=True).close()
    refused = None
except SiteError as error:
    refused = error.to_wire()
print(json.dumps([report.tier, report.reasons, refused]))
"""


@pytest.mark.parametrize(("kind", "tier"), [("docker", "S2"), ("nothing", "S2"), ("unknown", "S1")])
def test_what_a_container_leaves_is_found_out_and_the_reason_told(python, kind, tier):
    """Docker's default profile, no user namespaces, no Landlock: each is one reason that namespaces are out of reach."""
    found, reasons, refused = behind(python, kind, "-c", PROBE)
    assert (found, refused) == (tier, None)
    assert len(reasons) == 1
    assert "namespace" in reasons[0]


def test_where_no_filter_may_be_set_nothing_is_started_and_it_says_what_to_do(python):
    """Tier S0 is a refusal, and names the way out."""
    found, reasons, refused = behind(python, "unfiltered", "-c", PROBE)
    assert found == "S0"
    assert "seccomp filters, as Docker's" in refused["instead"]
    assert reasons == [" ".join(refused[part] for part in ("what", "why", "instead"))]


SITES = [("docker", "S2"), ("unknown", "S1")][: 2 if os.environ.get("RAPHA_LAB_DEEP") else 1]


@pytest.mark.parametrize(("kind", "tier"), SITES)
def test_a_site_there_answers_says_its_tier_and_holds(python, kind, tier):
    """In the card with the reason, in the evidence, in the receipt's entry of the log; no attack on a worker gets through."""
    told = behind(python, kind, str(HERE / "outer_site.py"))
    assert "refused" not in told, told
    assert told["user"] != 0
    assert told["says"]["card"] == tier
    assert "namespace" in told["says"]["why"][0]
    for place in ("log", "evidence"):
        said = {f"S{n}" for n in range(4) if f'S{n}"' in told["says"][place].replace("\\", "")}
        assert said == {tier}, place
    reached, tried, through = told["attacks"]
    assert reached == tier
    assert tried > 150
    assert through == []
