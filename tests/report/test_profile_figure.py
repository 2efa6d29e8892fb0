"""The picture of a hardware profile."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from e88.report.profile import profile_figure

TIMES = {16: 50.0, 32: 60.0, 96: 300.0}


def picture(best=(32, 32)):
    rows = [
        {"n_state": n, "d_inner": 1792 // n * n, "skipped": None, "forward_ns": t / 3, "forward_backward_ns": t}
        for n, t in TIMES.items()
    ]
    rows.append({"n_state": 128, "d_inner": 1792, "skipped": "wrong: error 1"})
    profile = {
        "device": "NVIDIA <H200>", "dtype": "bfloat16", "batch_size": 32, "window": 512, "d_inner": 1792,
        "date": "2026-11-22T10:00:00Z", "rows": rows,
    }  # fmt: skip
    return ET.fromstring(profile_figure(profile, best))


def elements(svg, tag):
    return [element for element in svg.iter() if element.tag.endswith("}" + tag)]


def test_points_stand_where_the_times_say():
    svg = picture()
    points = [(float(c.get("cx")), float(c.get("cy"))) for c in elements(svg, "circle")]
    both, forward = points[:3], points[3:]
    assert len(forward) == 3 and [x for x, _ in both] == [x for x, _ in forward] == sorted(x for x, _ in both)
    (x16, y16), (x32, y32), (x96, y96) = both
    assert (x96 - x32) / (x32 - x16) == pytest.approx(4, rel=0.02)
    # 18 heads of 96 are 1728: drawn as if they filled 1792.
    assert (y16 - y96) / (y16 - y32) == pytest.approx((300 * 1792 / 1728 - 50) / 10, rel=0.02)
    assert all(above < below for (_, above), (_, below) in zip(both, forward, strict=True))


@pytest.mark.parametrize(("best", "text"), [((32, 32), "best n_state 32"), ((16, 96), "best n_state 16 to 96")])
def test_says_what_and_where(best, text):
    told = [element.text for element in elements(picture(best), "text")]
    assert text in told and any("NVIDIA <H200>, bfloat16, 32 × 512 tokens" in line for line in told)
    assert {"forward", "forward + backward"} <= set(told)
