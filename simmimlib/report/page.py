"""A report as one HTML file: Markdown with its pictures embedded, a style inside, nothing to load. No torch here."""

import re
from html import escape
from pathlib import Path

CAPTIONS = {  # last word of a picture's name -> what it shows
    "arms": "Every arm, mean over seeds with its 95 % interval, beside the paper's numbers, which are ImageNet's.",
    "avg_dist": "Accuracy over AvgDist, how far hidden pixels are from visible ones, as a share of the image's side.",
    "images_seen": "Accuracy over the images seen in pre-training; 0 is the untrained encoder.",
    "blocks": "Probes of the frozen encoder by block; means over seeds, shading the range. Dashed: raw pixels.",
    "depth": "Fine-tuning and linear probes over the blocks of SimMIM's head and of MAE's decoder.",
    "loss": "Pre-training loss, divided by the first epoch's where arms have other losses, targets or masks; means "
    "over seeds, shading the range.",
    "top1": "Validation accuracy of fine-tuning; means over seeds, shading the range.",
    "reconstructions": "The same validation images under the default's masks; predictions fill the hidden pixels. "
    "Per-patch normalised targets are shown with the true patches' mean and standard deviation.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 4px 8px; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; }
img { zoom: 0.64; max-width: 100%; display: block; margin: 1.2em 0 0; } /* figures are drawn with 150 dots an inch */
h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
em { color: #555; font-size: 13px; }
code { background: #f3f3f3; padding: 0 3px; }
a.anchor-link { display: none; }
"""


def to_html(markdown: str, folder: str | Path, title: str) -> str:
    """A whole page; pictures of the Markdown are read from ``folder``."""
    import nbformat  # imported here, as nbconvert: only reports need them
    from nbconvert import HTMLExporter

    cell = nbformat.v4.new_markdown_cell(with_captions(markdown), id="report")  # else a random one
    notebook = nbformat.v4.new_notebook(cells=[cell])
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(folder), "name": title}})
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def with_captions(markdown: str) -> str:
    """Says below each picture what it shows."""

    def captioned(found: re.Match) -> str:
        kind = re.split(r"[-/]", Path(found[1]).stem)[-1]
        return f"{found[0]}\n\n*{CAPTIONS[kind]}*" if kind in CAPTIONS else found[0]

    return re.sub(r"^!\[[^]]*\]\(([^)]*)\)$", captioned, markdown, flags=re.MULTILINE)


def to_table(rows: list[dict]) -> str:
    """Markdown of rows with the same keys."""

    def line(cells: list) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    names = list(rows[0])
    return "\n".join([line(names), line(["---"] * len(names)), *(line(list(row.values())) for row in rows)])
