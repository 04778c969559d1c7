"""The report in a true browser: drawn without errors, usable by mouse, keys and screen readers.

Needs Chromium and its driver (Debian: `apt-get install chromium chromium-driver`).
"""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moeplace.report import report
from moeplace.study import study
from tests.test_report import large, problem, table_of_runs

__all__ = ["problem"]  # fixture

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver here"),
    pytest.mark.filterwarnings("default"),  # selenium's own
]

Browser = Any


@pytest.fixture(scope="module")
def page(problem: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report(study(problem, time_limit=3.0, expert_bytes=1000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def driver() -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def opened(driver: Browser, page: Path) -> Callable[..., Browser]:
    def opened(width: int = 1200, scheme: str = "light", path: Path = page) -> Browser:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media, "media": ""})
        driver.get(path.as_uri())
        until(lambda: driver.execute_script("return document.documentElement.dataset.ready"))
        return driver

    return opened


def until(ready: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := ready()) and time.monotonic() < end:
        time.sleep(0.05)
    assert found
    return found


def test_every_figure_is_drawn_without_a_message(opened: Callable[..., Browser]) -> None:
    browser = opened()
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => ["
        "p.id, p.querySelectorAll('.trace, .bars, .heatmaplayer image').length, p.offsetWidth,"
        "p.querySelector('.main-svg').getBoundingClientRect().width])"
    )
    assert len(drawn) >= 8
    for name, marks, width, inner in drawn:
        assert marks > 0, name
        assert width > 300, name
        assert inner <= width + 1, name
    assert browser.get_log("browser") == []
    asked = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert asked == 0


def test_hover_tells_the_number(opened: Callable[..., Browser]) -> None:
    browser = opened()
    for name, words in (
        ("plot-side0", "x bound"),
        ("plot-costs", "layer"),
        ("plot-speeds", "rank"),
    ):
        plot = browser.find_element("id", name)
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
        said = ""
        for right in (-60, -30, 0, 10, 20, 40):  # on a mark, wherever that lies
            chain = webdriver.ActionChains(browser)
            chain.move_to_element_with_offset(plot, right, -60).pause(0.3).perform()
            said = browser.execute_script(
                "return [...arguments[0].querySelectorAll('.hovertext')]"
                ".map(t => t.textContent).join(' ')",
                plot,
            )
            if said:
                break
        assert words in said, name


def test_filter_and_choice_of_plan_by_keyboard(opened: Callable[..., Browser]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = opened()
    low = browser.find_element("id", "from")
    low.send_keys(Keys.CONTROL, "a")
    low.send_keys("2", Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "to"
    assert browser.find_element("id", "shown").text == "layers 2 to 5 shown"
    rows = browser.execute_script(
        "return [...document.querySelectorAll('tr[data-layer]')].filter(r => !r.hidden)"
        ".map(r => Number(r.dataset.layer))"
    )
    assert min(rows) == 2
    assert max(rows) == 5
    ranges = "return document.getElementById(arguments[0])._fullLayout[arguments[1]].range"
    assert browser.execute_script(ranges, "plot-side0", "yaxis") == [5.5, 1.5]
    assert browser.execute_script(ranges, "plot-costs", "xaxis") == [1.5, 5.5]

    shown = "return document.getElementById('plot-side0').data[0].name"
    assert browser.execute_script(shown) == "contiguous"
    browser.find_element("css selector", "select[data-plot=plot-side0]").send_keys(Keys.ARROW_DOWN)
    assert browser.execute_script(shown) == "eplb"
    assert browser.execute_script(ranges, "plot-side0", "yaxis") == [5.5, 1.5]
    scales = browser.execute_script(
        "return ['plot-side0', 'plot-side1'].map(i => document.getElementById(i)._fullLayout"
        ".coloraxis).map(c => [c.cmin, c.cmax])"
    )
    assert scales[0] == scales[1]

    browser.find_element("id", "own-scale").send_keys(Keys.SPACE)
    scales = browser.execute_script(
        "return ['plot-side0', 'plot-side1'].map(i => document.getElementById(i)._fullLayout"
        ".coloraxis).map(c => [c.cmin, c.cmax])"
    )
    assert scales[0][1] > scales[1][1], "each plan has its own"
    assert browser.execute_script(ranges, "plot-side0", "yaxis") == [5.5, 1.5]
    browser.find_element("id", "own-scale").send_keys(Keys.SPACE)

    browser.find_element("id", "all").send_keys(Keys.ENTER)
    assert browser.find_element("id", "shown").text == "layers 0 to 5 shown"
    summary = browser.find_element("css selector", "details > summary")
    summary.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('details').open")
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light")])
def test_accessible(opened: Callable[..., Browser], width: int, scheme: str) -> None:
    assert violations(opened(width, scheme)) == []


def violations(browser: Browser) -> list[Any]:
    """What axe finds on the page with all its tables open."""
    package = importlib.util.find_spec("axe_selenium_python")
    if package is None or package.origin is None:
        pytest.skip("axe-selenium-python is not installed")
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    axe = Path(package.origin).parent / "node_modules/axe-core/axe.min.js"
    browser.execute_script(axe.read_text(encoding="utf-8"))
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run().then(r => done(JSON.stringify(r.violations)))"
    )
    return [
        (each["id"], [(node["target"], node["failureSummary"]) for node in each["nodes"]][:3])
        for each in json.loads(found)
    ]


def test_fits_a_phone(opened: Callable[..., Browser]) -> None:
    browser = opened(390)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    tops = browser.execute_script(
        "return ['plot-side0', 'plot-side1'].map(i => document.getElementById(i)"
        ".getBoundingClientRect().top)"
    )
    assert tops[1] > tops[0] + 300  # one below the other


def test_dark_and_light_inks(opened: Callable[..., Browser]) -> None:
    inks = []
    for scheme in ("light", "dark"):
        browser = opened(scheme=scheme)
        inks.append(
            browser.execute_script(
                "return [getComputedStyle(document.body).backgroundColor, getComputedStyle("
                "document.querySelector('#plot-costs .xtick text')).fill]"
            )
        )
    assert inks[0] == ["rgb(255, 255, 255)", "rgb(27, 27, 27)"]
    assert inks[1] == ["rgb(20, 23, 26)", "rgb(236, 236, 236)"]


def test_prints(opened: Callable[..., Browser]) -> None:
    browser = opened(scheme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    ground, tools, wide = browser.execute_script(
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle("
        "document.querySelector('.tools')).display, Math.max(...[...document.querySelectorAll("
        "'.plot .main-svg')].map(s => s.getBoundingClientRect().width))]"
    )
    assert ground == "rgb(255, 255, 255)"
    assert tools == "none"
    assert wide <= 680


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moeplace.bench_report import report_runs

    path = tmp_path_factory.mktemp("runs") / "report.html"
    path.write_text(report_runs(table_of_runs(path.parent / "t")), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_report_on_runs_is_drawn_and_accessible(
    opened: Callable[..., Browser], runs: Path, width: int, scheme: str
) -> None:
    browser = opened(width, scheme, runs)
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => [p.id, p.querySelectorAll("
        "'.trace').length, p.querySelectorAll('.annotation').length])"
    )
    assert [name for name, *_ in drawn] == [
        f"plot-{kind}-tiny" for kind in ("ratio", "gaps", "time", "profile")
    ]
    assert min(marks for _, marks, _ in drawn) >= 2
    assert [names for *_, names in drawn[1:]] == [3, 3, 3], "each line has its name"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert violations(browser) == []
    assert browser.get_log("browser") == []


def test_a_large_report_is_drawn(opened: Callable[..., Browser], tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    path.write_text(report(large()), encoding="utf-8")
    browser = opened(path=path)
    rows = browser.execute_script(
        "return document.getElementById('plot-side0')._fullData[0].z.length"
    )
    assert rows == 94
    assert browser.get_log("browser") == []
