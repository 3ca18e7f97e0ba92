"""A headless Chromium, for tests of pages: Selenium, which waits where a busy machine is late."""

import pathlib
import shutil

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.wait import WebDriverWait

# Seconds after which a page that does not come is a failure; a machine may be busy.
PATIENCE = 60


class Browser:
    """One window of Chromium."""

    def __init__(self):
        """Starts the browser; skips the test where there is none."""
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if not (chromium and driver):
            pytest.skip("no chromium and chromedriver here: the page was not opened in a browser")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self._driver = webdriver.Chrome(options, Service(driver))
        self._wait = WebDriverWait(self._driver, PATIENCE, ignored_exceptions=[WebDriverException])

    def open(
        self, page: pathlib.Path, fragment: str = "", width: int = 1280, dark: bool = False
    ) -> None:
        """Loads a page afresh and waits until its script has run."""
        self._driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        # A change of the fragment alone would not load the page.
        self._driver.get("about:blank")
        self._driver.get(page.as_uri() + fragment)
        self._wait.until(lambda driver: driver.execute_script(
            "return location.protocol === 'file:' && document.readyState === 'complete'"
        ))  # fmt: skip

    def run(self, script: str):
        """Returns the value of a JavaScript expression."""
        return self._driver.execute_script(f"return {script}")

    def find_text(self, selector: str) -> str:
        """Returns the text of the first element that a CSS selector finds, as it is seen."""
        return self._driver.find_element(By.CSS_SELECTOR, selector).text

    def wait_for(self, selector: str, text: str) -> None:
        """Waits until an element has a text in it.

        Raises:
            TimeoutException: it never has.
        """
        where = (By.CSS_SELECTOR, selector)
        told = f"{selector} without {text!r}"
        self._wait.until(expected_conditions.text_to_be_present_in_element(where, text), told)

    def click(self, selector: str) -> None:
        """Clicks the first element that a CSS selector finds, wherever the window is scrolled."""
        element = self._driver.find_element(By.CSS_SELECTOR, selector)
        self._driver.execute_script("arguments[0].click()", element)

    def press(self, *keys: str) -> None:
        """Presses keys one after another, at what has the focus."""
        ActionChains(self._driver).send_keys(*keys).perform()

    def read_log(self) -> list[dict]:
        """Returns what the page wrote to the console since the last call."""
        return self._driver.get_log("browser")

    def take_picture(self) -> bytes:
        """Returns the window as a PNG."""
        return self._driver.get_screenshot_as_png()

    def close(self) -> None:
        """Ends the browser and its driver."""
        self._driver.quit()
