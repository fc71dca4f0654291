"""What the models learn by name: recipes, scores, samples; a job trains any of them on a mesh."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import in_process

from gspmd.cli import trainer
from gspmd.cli.job import Job, JobError, make_job
from gspmd.errors import GspmdError
from gspmd.models import catalog, glam, images, nest, nest_gan, tasks, training, transformer, vmoe
from gspmd.models.tasks import RECIPES, TaskError
from gspmd.specs import read_mesh

GLAM = dataclasses.replace(
    glam.CONFIGS["tiny"], model_dim=8, hidden_dim=8, heads=2, head_dim=4, seq=16, experts=4
)
VMOE = dataclasses.replace(
    vmoe.CONFIGS["digits"], image=8, layers=2, sparse=1, model_dim=8, hidden_dim=8, heads=1,
    experts=4, group=4,
)  # fmt: skip
NEST = dataclasses.replace(
    nest.CONFIGS["digits"], image=8, dims=(4, 8), layers=(1, 1), heads=(1, 1), hidden=1
)
GAN = nest_gan.Config(NEST, dataclasses.replace(NEST, classes=1), latent=4)

MINI = {"glam": GLAM, "vmoe": VMOE, "nest": NEST, "nest_gan": GAN}


def task(model: str, config: Any = None, batch_size: int = 8) -> tasks.Task:
    return RECIPES[model].make(model, config or MINI[model], 0, batch_size)


def zeros(model: str) -> Any:
    shapes = jax.eval_shape(task(model).init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


# ---------------------------------------------------------------------------------------- recipes


def test_every_model_has_a_recipe_that_fits_its_mesh() -> None:
    assert set(RECIPES) == set(catalog.MODELS)
    for model, recipe in RECIPES.items():
        config = catalog.config(model, recipe.config)
        mesh, _ = read_mesh(recipe.mesh)
        assert mesh.devices == 8
        rules = catalog.model(model).rules_for(recipe.strategy, mesh.names)
        groups = recipe.batch_size // getattr(config, "group", 1)
        assert groups % mesh.size(rules["batch"] or ()) == 0


# ----------------------------------------------------------------------------------------- scores


def test_text_is_judged_by_its_loss_and_the_load_of_experts() -> None:
    """With weights of zero, each byte is as likely as any, and so is each expert."""
    scores = task("glam").judge(zeros("glam"))
    assert scores == pytest.approx({"loss": np.log(256), "balance": 1.0}, rel=1e-5)


def test_images_are_judged_by_how_many_are_read_right() -> None:
    """With weights of zero and a bias, each is read as a 3."""
    params = zeros("nest")
    params["head"]["bias"] = params["head"]["bias"].at[3].set(1)
    threes = np.mean(images.digits(8).held_out_labels == 3)
    assert task("nest").judge(params) == {"accuracy": pytest.approx(threes)}
    shown = task("nest").show(params, 2).splitlines()
    labels = images.digits(8).held_out_labels
    assert shown[-1].split() == f"{labels[0]}, read as 3 {labels[1]}, read as 3".split()


def test_a_gan_is_judged_by_what_is_taken_for_real() -> None:
    scores = task("nest_gan").judge(zeros("nest_gan"))
    assert scores == {"real taken for real": 0.5, "made taken for real": 0.5}


def test_images_are_drawn_beside_each_other() -> None:
    ramp = np.tile(np.linspace(-1, 1, 16, dtype=np.float32), (16, 1))[..., None]
    drawn = images.drawn([(ramp, "one"), (-ramp, "two"), (ramp, "")], beside=2).splitlines()
    assert len(drawn) == (8 + 1) + 1 + 8
    assert set(drawn[:8]) == {" ..::-==++*##%%@  @%%##*++==-::.."}
    assert drawn[8].split() == ["one", "two"]


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("vmoe", vmoe.CONFIGS["b16-every2"], "reads images of 3 channels, the digits have 1: tra"),
        ("transformer", transformer.CONFIGS["bert_480b"], "this configuration sees what follows:"),
        ("transformer", transformer.CONFIGS["tiny_nested"], "this configuration has an encoder, "),
    ],
)
def test_what_cannot_learn_from_this_data_is_refused(model: str, config: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        task(model, config)


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        ("nets", {}, "'nets' is not a model; did you mean 'nest'?"),
        ("nest", {"config": "digit"}, "'digit' is not a configuration of nest; did you mean 'dig"),
        ("nest", {"strategy": "expert"}, "no strategy 'expert': choose one of data, fsdp, tensor"),
        ("nest", {"sizes": {"seq": 4}}, "--seq: the configurations of nest have no seq; leave it"),
        ("nest", {"batch_size": 2000}, "a batch of 2000 images: there are 1437 to draw from"),
        ("vmoe", {"batch_size": 12}, "a batch of 12 images does not split into groups of 8; make"),
        ("glam", {"batch_size": 5}, "a batch of 5 x 64 = 320 tokens does not split into groups o"),
    ],
)
def test_a_job_that_there_is_not_is_refused(model: str, how: Any, message: str) -> None:
    with pytest.raises(GspmdError, match=message):
        _ = make_job(model, **how).plan


def test_a_size_that_the_model_lacks_is_an_error_of_the_job() -> None:
    with pytest.raises(JobError):
        make_job("vmoe", sizes={"dropout": 0.1})
    with pytest.raises(JobError, match="--microbatches 4 are for a pipeline, and nothing puts the"):
        make_job("transformer", microbatches=4)


# --------------------------------------------------------------------------------------- training


def job(model: str, **schedule: Any) -> Job:
    """A job of a few small steps on two devices."""
    made = make_job(model, mesh="data=2", strategy="data", **schedule)
    return dataclasses.replace(made, task=task(model))


@pytest.mark.exhaustive
def test_a_job_trains_is_judged_and_shows_what_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images go through the same loop as text: stopped, resumed, drawn."""
    kept = {"steps": 3, "checkpoints": tmp_path / "run", "save_every": 2}
    how = {"plot": tmp_path / "loss.png", "sample": 1}
    trainer.train(job("vmoe", **kept), resume=False, as_json=True, **how)
    whole = json.loads(capsys.readouterr().out)
    assert whole["losses"][0] == pytest.approx(3.25, abs=0.05)  # a bias of -log(10) in 10 classes
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "run" / "3").rename(tmp_path / "3")  # as if it had been stopped after step 2
    trainer.train(job("vmoe", **kept), resume=True, as_json=False, **how)
    told = capsys.readouterr()
    assert f"{whole['losses'][2]:.3f} at step 3; " in told.out
    assert " images per second\n" in told.out
    assert told.err == f"step 3/3  loss {whole['losses'][2]:.3f}\n"
    assert f"held out: accuracy {whole['held_out']['accuracy']:.3f}\n" in told.out
    assert whole["sample"] in told.out


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", MINI)
def test_a_job_on_devices_has_the_losses_of_one_device(model: str) -> None:
    there: list[training.Record] = []
    alone: list[training.Record] = []
    made = job(model, steps=3)
    made.train(there.append)
    made.train_alone(alone.append, steps=3)
    assert [r.loss for r in there] == pytest.approx([r.loss for r in alone], rel=1e-4)


# ------------------------------------------------------------------------ through the command line


def trained(model: str, folder: Path, *options: str) -> dict[str, Any]:
    done = in_process("train", model, "--json", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["vmoe", "nest"])
def test_digits_are_read_after_some_minutes(model: str, tmp_path: Path) -> None:
    found = trained(model, tmp_path)
    assert found["plan"]["devices"] == 8
    assert found["held_out"]["accuracy"] >= 0.95


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", RECIPES)
def test_every_model_trains_and_goes_on(model: str, tmp_path: Path) -> None:
    """A resumed run of the command line has the losses of an uninterrupted one."""
    whole = trained(model, tmp_path, "--steps", "4")
    kept = ("--checkpoint", "run", "--save-every", "2")
    first = trained(model, tmp_path, "--steps", "4", *kept)
    (tmp_path / "run" / "4").rename(tmp_path / "4")  # as if it had been stopped after step 2
    second = trained(model, tmp_path, "--steps", "4", *kept, "--resume")
    assert first["losses"] == whole["losses"]
    assert second["first_step"] == 3
    assert second["losses"] == whole["losses"][2:]
    assert second["held_out"] == whole["held_out"]
