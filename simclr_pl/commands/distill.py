"""`simclr distill`: a student trained on a fine-tuned teacher's answers."""

from collections.abc import Sequence

from simclr_pl.cli import Tracker
from simclr_pl.commands.classifiers import (
    load_classifier,
    measure,
    save_classifier,
    scores_table,
    scores_values,
    student_of,
    train,
)
from simclr_pl.commands.encoders import clean_views, data_for, load_subject, source_for
from simclr_pl.commands.results import publish, result_file
from simclr_pl.data import Source
from simclr_pl.data.labels import LabelledSubset
from simclr_pl.evaluation.distill import Distill
from simclr_pl.evaluation.finetune import Classification


def distill(
    teacher: str,
    student: str = "same",
    dataset: str | None = None,
    temperature: float = 1.0,
    labelled_weight: float = 0.0,
    epochs: int = 100,
    lr: float = 0.1,
    batch_size: int = 256,
    seed: int = 0,
    out: str | None = None,
    num_workers: int | None = None,
    devices: int | str = "auto",
    accelerator: str = "auto",
    precision: str | None = None,
    track: Sequence[Tracker] = (),
) -> None:
    """Train a student, from a random start, on a fine-tuned teacher's answers to all training samples.

    Labels are not needed: a sample without one teaches as much as one with. The recipe is SimCLRv2's
    (section 3): crops and flips (of other samples than images, views as in training), LARS, a warm-up
    and a cosine. The student is saved beside the result, NAME.distill.ckpt, as `simclr finetune` saves
    the teacher. For example:

        simclr distill runs/simclr/version_0/checkpoints/last.finetune.ckpt --student resnet18

    Args:
        teacher: A checkpoint that `simclr finetune` or `simclr distill` wrote.
        student: The student's architecture: same for the teacher's, without its projector; a model of
            timm or torchvision; or a checkpoint or a run's folder.
        dataset: A folder, a packed folder, a file of texts, a YAML config or its name, or the name of a
            source; by default that of the teacher.
        temperature: That divides the logits of both. The paper has 0.1 for a student that is the same,
            else 1, and says that it matters little; short trainings want 1.
        labelled_weight: Weight of the cross-entropy with the labels that the teacher was fine-tuned on,
            from 0 for none to 1 for nothing else.
        epochs: Over all training samples; the paper has 400.
        lr: Learning rate, times the square root of the batch.
        batch_size: Samples of a step over all devices at most.
        seed: Of the order and the views.
        out: The JSON file; by default <teacher>.distill.json beside the teacher.
        num_workers: Loader processes of each device; by default one for each core.
        devices: How many, or auto for all.
        accelerator: cpu, gpu or auto.
        precision: For example bf16-mixed; by default 32-true.
        track: Trackers that log the result into the run.
    """
    subject, classifier, origin = load_classifier(teacher)
    file = result_file("distill", subject, out)
    source: Source = source_for(subject, dataset or origin.dataset)
    if labelled_weight:  # the other labels stay hidden, as they were from the teacher
        source = LabelledSubset(source, origin.fraction, origin.files, origin.seed, keep_rest=True)
    same = student == "same"
    model = subject if same else load_subject(student, in_channels=source.channels)
    pupil = student_of(model, classifier.head.out_features)
    module = Distill(pupil, classifier, temperature, labelled_weight, lr, batch_size, seed)
    data = data_for(
        subject,
        source=source,
        augment=origin.augment() if origin.views else clean_views(subject, source),
        seed=seed,
        num_workers=num_workers,
        n_views=1,
    )
    options = {"devices": devices, "accelerator": accelerator, "precision": precision}
    scores = {"student": train(module, data, epochs, options)}
    scores["teacher"] = measure(Classification(classifier), data, options)
    saved = file.with_suffix(".ckpt")
    save_classifier(saved, model, pupil, origin)
    count, total = len(data.samples("train")), scores["student"].total
    chance = 1 / classifier.head.out_features
    title = (
        f"{student} from {teacher}, {count:,} {source.unit}, {epochs} epochs, {total:,} query "
        f"{source.unit}; chance is {100 * chance:.1f} %"
    )
    values = {
        **scores_values("", scores["student"]),
        **scores_values("_teacher", scores["teacher"]),
        "top1_chance": chance,
        "samples": count,
        "query": total,
        "epochs": epochs,
        "classifier": str(saved),
        "options": {
            "student": student,
            "dataset": dataset,
            "temperature": temperature,
            "labelled_weight": labelled_weight,
            "lr": lr,
            "batch_size": batch_size,
            "seed": seed,
        },
    }
    table = scores_table(title, scores)
    publish("distill", subject, [table, f"The student is in {saved}"], values, out, track)
