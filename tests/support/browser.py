"""Debian's chromium without a window; needs chromium-driver too."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = """headless=new no-sandbox disable-gpu disable-quic no-first-run hide-scrollbars
    disable-background-networking disable-component-update disable-sync"""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Its driver, which logs what the page complains of and what it loads."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in [*_FLAGS.split(), f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver")) as driver:
        yield driver


def show(browser: Any, page: Path, *, width: int, height: int = 900, scheme: str = "", media: str = "") -> None:
    """Open the page on a screen of this size, a phone's where it is narrow, or as another medium such as print."""
    sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get_log("performance")
    browser.get(page.as_uri())
