"""How fast the front end is: the sidebar's first paint with 200 jobs, and what a key costs in an enclave cell."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "ui"))
from lab import Lab, Server, browser

JOBS = 200
CONNECT = 'import rapha_lab as rapha\n%load_ext rapha_lab\nsite = rapha.connect("demo")'
FILL = f"""for start in range(0, {JOBS}, 20):
    for job in [site.run("1", "flchain") for _ in range(20)]:
        job.wait()"""
BODY = "\n".join(f"x{line} = patients.mean('age', epsilon=0.1)  # line {line}" for line in range(100))

PAINT = """async () => {
    const { shell, commands } = window.jupyterapp;
    shell.collapseLeft();
    await new Promise(resolve => setTimeout(resolve, 500));
    const start = performance.now();
    await commands.execute('rapha-lab:open-panel');
    while (document.querySelectorAll('.rapha-Panel .rapha-Job').length < %d) {
        await new Promise(requestAnimationFrame);
    }
    await new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve)));
    return performance.now() - start;
}"""
TYPE = """async index => {
    const { sharedModel } = window.jupyterapp.shell.currentWidget.content.widgets[index].model;
    const end = sharedModel.getSource().length;
    const costs = [];
    for (let key = 0; key < 300; key++) {
        const start = performance.now();
        sharedModel.updateSource(end + key, end + key, 'x');
        costs.push(performance.now() - start);
        await new Promise(resolve => setTimeout(resolve));
    }
    return costs;
}"""


def main() -> None:
    """Measure both and print one line each."""
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        server = Server(Path(folder))
        server.start()
        try:
            lab = Lab(server, chromium.new_page(viewport={"width": 1280, "height": 800}))
            lab.load()
            lab.write("bench.ipynb", CONNECT, FILL, f"%%enclave flchain\n{BODY}", BODY)
            lab.open("bench.ipynb")
            lab.run(0)
            lab.run(1)
            lab.reload()
            lab.page.wait_for_timeout(3000)
            paints = [lab.page.evaluate(PAINT % JOBS) for _ in range(5)]
            print(f"sidebar with {JOBS} jobs: first {paints[0]:.0f} ms, then {median(paints[1:]):.0f} ms")
            enclave, plain = (lab.page.evaluate(TYPE, index) for index in (2, 3))
            print(
                f"a key in a plain cell of 100 lines: {median(plain):.2f} ms, in an enclave cell: {median(enclave):.2f} ms"
            )
        finally:
            server.stop()


if __name__ == "__main__":
    main()
