"""Splits of datasets from the Hugging Face hub or its local cache."""

from collections.abc import Iterable

from llm2.errors import UserError

HUB_TIMEOUT = 5.0  # seconds; a reachable hub answers within one


def hub_rows(dataset: str, split: str, subset: str | None = None) -> Iterable[dict]:
    """A split of a dataset. Raises UserError if neither hub nor cache has it."""
    import datasets  # takes a second, and local files do not need it

    if not hub_answers(dataset):  # use the cache at once: the library would retry for half a minute
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(*filter(None, [dataset, subset]), split=split)
    except (OSError, ValueError):  # the hub raises OSErrors; ValueError if another part of it is cached
        raise UserError(
            f"{dataset} is not in the local cache and the Hugging Face hub cannot be reached: "
            "set data_file=<local JSON lines in its format>, or task=testbed, which needs no download"
        ) from None


def hub_answers(dataset: str) -> bool:
    """Whether the hub answers one request without retries."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT)
    except Exception:  # no network, a refusing proxy, HF_HUB_OFFLINE; the class depends on the hub's HTTP library
        return False
    return True
