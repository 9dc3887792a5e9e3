import numpy as np
import pytest

from made_runs import settings
from softcfg import UserError
from softcfg.decoding.randomness import image_uniforms
from softcfg.runs.plan import Plan, check_growth, differences, fingerprint


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (10, 4), (12, 4), (3, 100), (50_000, 125), (1001, 7)])
def test_every_image_is_in_one_shard(count: int, batch: int) -> None:
    plan = Plan(count, batch, (0, 1), 2, 0)
    shards = [plan.indices(number) for number in range(plan.num_shards)]
    assert [index for shard in shards for index in shard] == list(range(count))
    assert all(len(shard) == batch for shard in shards[:-1])
    assert len(shards[-1]) > 0


def test_labels_are_taken_in_turn() -> None:
    assert Plan(10, 4, (5, 7, 2), 9, 0).labels_of(range(4, 9)) == [7, 2, 5, 7, 2]
    balanced = Plan(50_000, 125, tuple(range(1000)), 1000, 0).labels_of(range(50_000))
    assert balanced[:1001] == [*range(1000), 0]
    assert (np.bincount(balanced) == 50).all()


def test_random_labels_depend_on_seed_and_index_alone() -> None:
    plan = Plan(4000, 10, "random", 7, 3)
    labels = plan.labels_of(range(4000))
    assert Plan(99, 4, "random", 7, 3).labels_of([98, 5]) == [labels[98], labels[5]]
    assert Plan(4000, 10, "random", 7, 4).labels_of(range(4000)) != labels
    counts = np.bincount(labels, minlength=7)
    assert len(counts) == 7
    assert abs(counts - 4000 / 7).max() < 5 * np.sqrt(4000 / 7)
    # They must not tell anything about the numbers that draw the tokens.
    first = image_uniforms(3, range(4000), 1)[:, 0].numpy()
    assert abs(np.corrcoef(first, labels)[0, 1]) < 0.06


def test_differences_name_fields_and_values() -> None:
    one, other = settings(), settings(seed=1, guidance={"method": "CFG", "guidance_scale": 4.0, "floor": 0.1})
    assert differences(one, other) == [
        "guidance.guidance_scale (3.0 there, 4.0 here)",
        "seed (0 there, 1 here)",
        "guidance.floor (None there, 0.1 here)",
    ]
    assert differences(one, settings(labels=list(range(1000)))) == ["labels"]
    weights = {"config": {"width": 1}, "sha256": "0" * 64}, {"config": {"width": 2}, "sha256": "1" * 64}
    assert differences(*(settings(generator=each) for each in weights)) == ["generator.sha256"]
    assert fingerprint(one) != fingerprint(other)


def test_what_changes_no_image_may_differ() -> None:
    other = settings(num_samples=20, model="elsewhere", command="x", environment=[])
    assert differences(settings(), other) == []
    assert fingerprint(settings()) == fingerprint(other)


def test_a_run_grows_but_does_not_shrink() -> None:
    check_growth(settings(10), settings(11))
    with pytest.raises(UserError, match="has 10 images, more than --num-samples 9"):
        check_growth(settings(10), settings(9))
