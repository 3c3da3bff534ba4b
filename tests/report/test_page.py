import re

from simmimlib.report import figures
from simmimlib.report.page import CAPTIONS, to_html, to_table, with_captions


def test_a_page_needs_no_other_file(tmp_path):
    import matplotlib.pyplot as plt

    figures.save(plt.figure(figsize=(1, 1)), tmp_path / "figures/pretraining-loss.png")
    text = "# Title\n\n![a loss](figures/pretraining-loss.png)\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    page = to_html(text, tmp_path, "<b>")
    assert "<td>2</td>" in page and "<h1" in page and CAPTIONS["loss"] in page
    sources = re.findall(r'<(?:img|script|link)[^>]*(?:src|href)="([^"]*)"', page)
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert "<title>&lt;b&gt;</title>" in page and to_html(text, tmp_path, "<b>") == page


def test_captions_go_below_their_pictures():
    text = with_captions("![arms](figures/arms.png)\n\n![x](figures/other.png)")
    assert text == f"![arms](figures/arms.png)\n\n*{CAPTIONS['arms']}*\n\n![x](figures/other.png)"
    assert CAPTIONS["avg_dist"] in with_captions("![a](figures/avg_dist.png)")


def test_tables_hold_bars():
    assert to_table([{"a": "x | y", "b": 1}]) == "| a | b |\n| --- | --- |\n| x \\| y | 1 |"
