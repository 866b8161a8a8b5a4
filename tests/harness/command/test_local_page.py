import os
import sys
from types import SimpleNamespace

from harness.command import local_page


def test_a_page_is_for_this_machine_alone(monkeypatch, capsys):
    given, page = {}, SimpleNamespace(server_port=7, launch=lambda **o: given.update(o))
    page.close = lambda **_: given.update(closed=True)
    for name in ("_look", "_wait_for_the_end"):
        monkeypatch.setattr(local_page, name, lambda: None)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    monkeypatch.setattr(os, "environ", {})
    with local_page.private_folder() as folder:
        local_page.serve(lambda: page, port=0, browser=False, css="")
        assert os.environ["GRADIO_TEMP_DIR"].startswith(str(folder))
    assert (given["server_name"], given["share"], given["closed"]) == ("127.0.0.1", False, True)
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["GRADIO_SHARE"]) == ("1", "False")
    assert not folder.exists()
    assert "http://127.0.0.1:7" in capsys.readouterr().out
