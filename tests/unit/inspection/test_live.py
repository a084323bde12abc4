"""What `m4train watch` serves, and to whom."""

import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from m4train import cli
from m4train.config.compose import load_config, save_config
from m4train.inspection.live import server, state


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(load_config(["experiment=digits_sft", f"run_dir={folder}"]), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    return folder


@pytest.fixture
def address(run):
    served, address = server([run], 0)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield address
    served.shutdown()
    served.server_close()


def answer(address, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as given:
            return given.status, given.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_report_is_served_on_the_loopback_to_who_knows_the_token(run, address):
    status, page = answer(address)
    assert (status, urlsplit(address).hostname) == (200, "127.0.0.1")
    assert "<svg" in page
    assert f'data-live="{state([run])}"' in page
    assert answer(f"{address}state") == (200, state([run]))
    host = f"http://127.0.0.1:{urlsplit(address).port}"
    for other in ("", "/", "/state", "/x/", "/x/page", f"{urlsplit(address).path}../config.yaml", "/%00/"):
        assert answer(host + other)[0] == 404, other
    assert answer(address, Host="elsewhere.example:80")[0] == 404


def test_the_state_changes_when_the_run_goes_on(run, address):
    before = answer(f"{address}state")[1]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.5}\n')
    assert answer(f"{address}state")[1] != before
    assert f'data-live="{state([run])}"' in answer(f"{address}page")[1]


def test_what_is_no_run_or_no_free_port_is_refused(tmp_path, run, address, capsys):
    assert cli.main(["watch", str(tmp_path / "nothing")]) == 1
    assert "holds no config.yaml" in capsys.readouterr().err
    assert cli.main(["watch", str(run), "--port", str(urlsplit(address).port)]) == 2
    assert "choose another one" in capsys.readouterr().err
