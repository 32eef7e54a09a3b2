"""The public interface is `qtool.api.__all__`: nothing more, nothing less."""

from types import ModuleType

from qtool import api


def test_what_is_public_is_what_all_says() -> None:
    public = {
        name for name, value in vars(api).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert sorted(public) == sorted(api.__all__)
    undocumented = [name for name in api.__all__ if not (getattr(api, name).__doc__ or "").strip()]
    assert not undocumented
