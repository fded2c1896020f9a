"""The page of `layerskip lens` in a real browser, as a person with a mouse, a keyboard or a phone uses it.

Needs Debian's chromium and chromium-driver: `make test-extras`. Screenshots are left in build/lens, to be looked at.
"""

import base64
import json
from pathlib import Path

import pytest

from tests.support.browser import chromium, show
from tests.support.runs import cli
from tests.support.saved_models import save_model, write_prompts

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.extras
SCREENSHOTS = Path(__file__).parents[2] / "build" / "lens"
TEXTS = ["the end </script><script>document.title = 'broken'</script>", "x = 1 <b>and</b>"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two models and two prompts, and all its figures."""
    folder = tmp_path_factory.mktemp("lens")
    given = ["--max_new_tokens", "12", "--prompts", str(write_prompts(folder / "prompts.jsonl", TEXTS))]
    for seed, name in enumerate(("plain", "trained")):
        given += ["--model", str(save_model(folder / name, seed=seed))]
    with pytest.MonkeyPatch.context() as patch:
        for suffix in (".html", ".json"):
            assert cli(patch, "lens", *given, "--output", str(folder / f"lens{suffix}")) == 0
    return folder / "lens.html", json.loads((folder / "lens.json").read_text())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def opened(page, browser, request):
    """The page, newly opened at some width, and what it should show; afterwards it must not have complained."""
    width, scheme = getattr(request, "param", (1360, "light"))
    show(browser, page[0], width=width, scheme=scheme)
    yield browser, page[1]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(SCREENSHOTS / f"{request.node.name}.png"))
    assert browser.get_log("browser") == []


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def cell(browser, row, token):
    return find(browser, f'td[data-row="{row}"][data-token="{token}"]')


def texts(browser, selector):
    return [each.get_attribute("textContent") for each in browser.find_elements(By.CSS_SELECTOR, selector)]


def percent(share):
    return f"{100 * share:.1f}\u202f%"


def test_cells_show_each_layers_choice_and_hovering_shows_the_rest(opened):
    browser, told = opened
    run = told["prompts"][0]["runs"][0]
    assert browser.title == "Layer lens: plain and trained"  # and no prompt ran as a script
    for row in range(4):
        chosen = [told["token_texts"][str(tops[0])] for tops in run["top_ids"][row]]
        assert texts(browser, f"#grid tbody tr:nth-child({row + 1}) td") == chosen
        settled = [layer <= row + 1 for layer in run["saturation"]]
        classes = [cell(browser, row, token).get_attribute("class") for token in range(12)]
        assert ["settled" in each for each in classes] == settled
    webdriver.ActionChains(browser).move_to_element(cell(browser, 1, 3)).perform()
    assert texts(browser, "#detail li code") == [told["token_texts"][str(token)] for token in run["top_ids"][1][3]]
    shown = zip(texts(browser, "#detail li span"), run["top_probs"][1][3], strict=True)
    assert all(abs(float(said.split("\u202f")[0]) - 100 * share) < 0.06 for said, share in shown)
    facts = [
        f"{run['entropy'][1][3]:.2f}",
        f"{run['kl'][1][3]:.2f}",
        *map(str, (run["saturation"][3], run["first_hit"][3])),
    ]
    assert texts(browser, "#detail dd") == facts


def test_the_scrubber_shows_the_text_of_a_layer_and_play_runs_through_all(opened):
    browser, told = opened

    def words(model):
        return texts(browser, f"#strips section:nth-child({model + 1}) button")

    def chosen(model, layer):
        tops = told["prompts"][0]["runs"][model]["top_ids"][layer - 1]
        return [told["token_texts"][str(top[0])] for top in tops]

    assert [words(model) for model in (0, 1)] == [chosen(model, 4) for model in (0, 1)]
    find(browser, "#layer").send_keys(Keys.HOME)
    assert [words(model) for model in (0, 1)] == [chosen(model, 1) for model in (0, 1)]
    assert find(browser, "#layer-shown").text == "1 of 4"
    assert texts(browser, "#grid tr.now th") == ["1"]
    find(browser, "#play").click()
    assert find(browser, "#play").get_attribute("aria-pressed") == "true"
    WebDriverWait(browser, 20).until(lambda _: find(browser, "#layer-shown").text == "4 of 4")
    WebDriverWait(browser, 20).until(lambda _: find(browser, "#play").get_attribute("aria-pressed") == "false")
    assert words(0) == chosen(0, 4)


def test_the_keyboard_walks_the_grid_with_one_stop_of_the_tab_key_and_is_told_what_is_there(opened):
    browser, told = opened
    assert len(browser.find_elements(By.CSS_SELECTOR, "#grid td[tabindex='0']")) == 1
    cell(browser, 3, 0).click()
    keys = webdriver.ActionChains(browser)
    keys.send_keys(Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT).perform()
    focused = browser.switch_to.active_element
    assert (focused.get_attribute("data-row"), focused.get_attribute("data-token")) == ("2", "1")
    run = told["prompts"][0]["runs"][0]
    assert percent(run["top_probs"][2][1][0]) in focused.get_attribute("aria-label")
    assert "after 3 of 4 layers" in focused.get_attribute("aria-label")
    assert f"entropy {run['entropy'][2][1]:.2f}" in find(browser, "#said").get_attribute("textContent")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#grid td[tabindex='0']")) == 1
    webdriver.ActionChains(browser).send_keys(Keys.END, Keys.PAGE_UP, Keys.ARROW_UP).perform()
    focused = browser.switch_to.active_element
    assert (focused.get_attribute("data-row"), focused.get_attribute("data-token")) == ("0", "11")


def test_lines_are_of_the_tokens_that_were_on_top_of_any_layer(opened):
    browser, told = opened
    run = told["prompts"][0]["runs"][0]
    token = max(range(12), key=lambda token: len(run["lines"][token]["ids"]))
    cell(browser, 0, token).click()
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    lines = run["lines"][token]
    drawn = [path.get_attribute("data-id") for path in browser.find_elements(By.CSS_SELECTOR, "#chart path[data-id]")]
    assert drawn == [str(each) for each in lines["ids"]]
    assert not find(browser, "#grid").is_displayed()
    browser.execute_script("setLayer(2)")
    assert texts(browser, "#chosen span") == [percent(probs[1]) for probs in lines["probs"]]
    find(browser, "#chosen input").click()
    assert len(browser.find_elements(By.CSS_SELECTOR, "#chart path[data-id]")) == len(drawn) - 1
    find(browser, "#chosen input").click()


def test_prompts_and_models_can_be_chosen(opened):
    browser, told = opened
    find(browser, "#prompt option:nth-child(2)").click()
    find(browser, "input[name=model][value='1']").click()
    run = told["prompts"][1]["runs"][1]
    assert texts(browser, "#grid thead th")[1:] == [told["token_texts"][str(token)] for token in run["tokens"]]
    assert find(browser, "#prompt-text").get_attribute("textContent") == TEXTS[1]


@pytest.mark.parametrize(
    "opened", [(390, "light"), (390, "dark"), (1360, "dark")], indirect=True, ids="{0[0]}-{0[1]}".format
)
def test_nothing_is_wider_than_the_screen_and_texts_stand_out_from_what_is_behind_them(opened):
    browser, _ = opened
    width, seen = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= seen
    contrasts = browser.execute_script(
        """
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const light = (colour) => {
          canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
            .map((each) => each / 255).map((each) => (each <= 0.04 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
        };
        setLayer(2);
        return [...document.querySelectorAll("#grid td, .words button, fieldset label:has(:checked)")].map((each) => {
          const style = getComputedStyle(each);
          const [one, two] = [light(style.color), light(style.backgroundColor)];
          return Math.max(one, two) / Math.min(one, two);
        });
        """
    )
    assert min(contrasts) >= 4.5  # WCAG AA


def test_a_printed_page_has_the_whole_grid_in_bands(opened):
    browser, _ = opened
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / "printed.pdf").write_bytes(pdf)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_script("printedTokens = 5; window.dispatchEvent(new Event('beforeprint'))")
    grids = browser.find_elements(By.CSS_SELECTOR, "#grid table")
    assert [len(grid.find_elements(By.CSS_SELECTOR, "thead th")) for grid in grids] == [6, 6, 3]
    assert [find(grid, "caption").text for grid in grids] == 3 * ["plain"]  # the model, since its button is not printed
    assert not find(browser, ".controls").is_displayed()
    assert find(browser, "#prompt-text").is_displayed()
    assert find(browser, "tfoot").value_of_css_property("display") == "table-row-group"  # stands once, not on each page
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert not find(browser, "#prompt-text").is_displayed()
