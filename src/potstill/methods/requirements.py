"""What a method needs beyond logits and labels: declared here, provided by the Distiller and the data pipeline."""

from dataclasses import dataclass
from typing import Literal

MapChoice = Literal["none", "last", "middle", "pairs", "all"]
SecondImageChoice = Literal["none", "strong", "same class"]


@dataclass(frozen=True)
class Requirements:
    """Each field is one need with one provider; the defaults are those of a plain logit method."""

    teacher: bool = True
    members: bool = False  # the outputs of each of several teachers, not only their combination
    peers: bool = False  # untrained copies of the student
    # Feature maps: of the last stage; of one stage halfway (FitNet's hint); of every stage of student and teacher
    # paired by depth; of all stages of both, unpaired.
    maps: MapChoice = "none"
    before_activation: Literal["none", "teacher", "both"] = "none"  # whose maps are read before their last activation
    norms: bool = False  # the BatchNorm in front of each of the teacher's maps
    embedding: bool = False
    student_head: bool = False
    teacher_head: bool = False
    pooled: bool = False  # the embedding must be the mean of the last map over its places
    classes: bool = False  # the number of classes before the first step
    index: bool = False  # sample ids, and the labels of the whole training set before the first step
    batch_size: bool = False  # the largest number of images per step, before the first
    second: SecondImageChoice = "none"  # a second image for each: a strongly augmented view, or one of the same class
    second_gradient: bool = True
    epoch: bool = False  # where training stands
    prepare: bool = False  # passes over the teacher's outputs before training
    labels: bool = False  # other terms than cross-entropy read labels: images without are refused
    soft_targets: bool = False  # the teacher's logits, beside its maps or embedding
    several: bool = False  # relations between images: more than one per batch

    @property
    def logits_only(self) -> bool:
        """Whether the method compares logits and nothing else, so that logits may be standardised around it."""
        return self.teacher and not self.features and not self.members

    @property
    def features(self) -> bool:
        """Whether more than logits is read from the networks."""
        return self.maps != "none" or self.embedding or self.student_head or self.teacher_head

    @property
    def teacher_maps(self) -> bool:
        """Whether the method reads layers of the teacher before its embedding."""
        return self.teacher and (self.maps != "none" or self.norms)

    @property
    def teacher_layers(self) -> bool:
        """Whether the method reads more of the teacher than its logits."""
        return self.teacher and (self.features or self.norms)

    @property
    def teacher_classes(self) -> bool:
        """Whether the method reads the teacher's logits or its head, which a teacher without classes does not have."""
        logits = self.soft_targets or not (self.maps != "none" or self.embedding)
        return self.teacher and (logits or self.teacher_head)

    @property
    def storable(self) -> bool:
        """Whether all required teacher outputs are small enough to be cached for each view: logits and embeddings."""
        return self.teacher and self.maps == "none" and not self.norms and self.second != "same class"

    @property
    def training_only(self) -> bool:
        """Whether the terms mean nothing on images that are not those of training."""
        return self.index or self.second != "none" or self.peers or self.batch_size

    @property
    def example(self) -> bool:
        """Whether anything is sized by an example of the images."""
        return self.features or self.classes or self.index or self.peers or self.batch_size or self.norms

    def listed(self) -> list[str]:
        """For people: each need in words."""
        words = {
            "members": "several teachers",
            "peers": "students that learn together",
            "norms": "BatchNorm in the teacher",
            "embedding": "embedding",
            "student_head": "student's linear head",
            "teacher_head": "teacher's linear head",
            "pooled": "average pooling before the head",
            "classes": "number of classes",
            "index": "sample index",
            "batch_size": "batch size",
            "epoch": "epoch progress",
            "prepare": "a pass over the data before training",
            "labels": "labels of every image",
            "several": "two images a batch or more",
        }
        found = ["teacher"] if self.teacher else ["no teacher"]
        if self.maps != "none":
            which = {"last": "last stage", "middle": "middle stage", "pairs": "paired stages", "all": "all stages"}
            before = {"none": "", "teacher": ", the teacher's before activation", "both": ", before activation"}[
                self.before_activation
            ]
            found.append(f"feature maps ({which[self.maps]}{before})")
        if self.second != "none":
            found.append("a strongly augmented second view" if self.second == "strong" else "a second image per class")
        return found + [text for name, text in words.items() if getattr(self, name)]
