"""`python -m tools.notebooks`: runs the notebooks of docs/examples and keeps what they put out.

Needs Jupyter's kernel and client, which the extra `test` brings.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def executed(file: Path, directory: str | Path) -> dict[str, Any]:
    """A notebook with what its cells put out when they run one after the other in a new kernel, in a directory.

    Raises CellExecutionError if a cell does, with its traceback.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    metadata = json.loads(file.read_text(encoding="utf-8"))["metadata"]
    resources = {"metadata": {"path": str(directory)}}
    NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute()
    found = json.loads(nbformat.writes(notebook))
    # The kernel adds its version, and libraries their warnings about this machine.
    found["metadata"] = metadata
    for cell in found["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [one for one in cell["outputs"] if one.get("name") != "stderr"]
            for output in cell["outputs"]:
                if "image/jpeg" in output.get("data", {}):
                    del output["data"]["image/png"]  # the same, several times as large
    return found


def main() -> None:
    for file in sorted(EXAMPLES.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as directory:
            found = executed(file, directory)
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{file.name}: {sum(len(cell.get('outputs', [])) for cell in found['cells'])} outputs")


if __name__ == "__main__":
    main()
