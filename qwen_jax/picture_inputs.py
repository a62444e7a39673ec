"""Pictures beside a prompt, or in a conversation, put in their places among its tokens.

Knows the checkpoint's preprocessor rules, placeholders and limits; knows no weight.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.prompt import images
from qwen_jax.prompt.media import Media
from qwen_jax.prompt.media_options import MediaOptions
from qwen_jax.prompt.preprocessor import IMAGE_FILE, VisionRules
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.prompt.vision_prompt import VIDEO_FORMS, VideoForm, VisionPrompt, build_prompt
from qwen_jax.runtime import Buckets
from qwen_jax.weights.checkpoint import Loaded
from qwen_jax.weights.config import ModelConfig

log = logging.getLogger(__name__)

_OPTION = "mm_processor_kwargs"


class PictureInputs:
    """Reads pictures and expands their placeholders.

    Args:
        config: the checkpoint.
        tokenizer: None where the checkpoint has none.
        rules: how pictures are prepared; None where the checkpoint does not say.
        options: ``mm_processor_kwargs`` for every prompt.
        video_form: what a video's frames replace in a prompt.
        buckets: shapes of the tower.
        max_model_len: the longest context.

    Attributes:
        options: what is wished of every prompt's pictures.

    Raises:
        ValueError: an option or a video form that does not exist.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        rules: VisionRules | None,
        *,
        options: Mapping[str, Any] | None,
        video_form: VideoForm,
        buckets: Buckets,
        max_model_len: int,
    ):
        if video_form not in VIDEO_FORMS:
            raise ValueError(
                f"video_form={video_form!r} is unknown; use {' or '.join(VIDEO_FORMS)}"
            )
        self._config, self._tokenizer, self._rules = config, tokenizer, rules
        self.options = MediaOptions.from_mapping(options or {}, _OPTION)
        self._video_form: VideoForm = video_form
        self._buckets, self._max_model_len = buckets, max_model_len

    def place(
        self,
        parts: Sequence[str | int],
        media: Sequence[Media],
        *,
        options: Mapping[str, Any] | None,
        name: str,
    ) -> VisionPrompt | None:
        """Expands a prompt cut at its special tokens; None for one of text alone.

        Args:
            parts: as `build_prompt` takes them.
            media: pictures and videos of the prompt.
            options: ``mm_processor_kwargs`` of this prompt.
            name: of the prompt, for errors.

        Raises:
            ValueError: a picture that cannot be used, or has no place in the prompt.
        """
        wishes = MediaOptions.from_mapping(options or {}, f"{name}: {_OPTION}")
        pads = {self._config.image_token_id, self._config.video_token_id} - {None}
        if not media and pads.isdisjoint(part for part in parts if isinstance(part, int)):
            return None
        pictures = []
        if media:
            pictures = images.prepare(media, self._rules_for(media), wishes.over(self.options))
        for picture in pictures:
            self._check_size(picture)
        return build_prompt(
            parts,
            pictures,
            self._config,
            tokenizer=self._tokenizer,
            video_form=self._video_form,
            max_model_len=self._max_model_len,
            name=name,
        )

    def check_can_see(self, media: Sequence[Media]) -> None:
        """Raises ValueError where there are pictures, and the model reads text only."""
        if media and self._config.vision is None:
            raise ValueError(
                f"{media[0].name}: a picture needs a vision-language model, and a "
                f"{self._config.model_type} checkpoint reads text only; use a Qwen3-VL checkpoint"
            )

    def _rules_for(self, media: Sequence[Media]) -> VisionRules:
        self.check_can_see(media)
        if self._rules is None:
            raise ValueError(
                f"{media[0].name}: the checkpoint directory has no {IMAGE_FILE}, which says how "
                "pictures are prepared; copy it from the published model"
            )
        return self._rules

    def _check_size(self, picture: images.Picture) -> None:
        """Refuses what no program of the tower takes, before anything runs."""
        sizes = {"patches": len(picture.patches), "segments": picture.grid[0]}
        wish = "max_pixels" if picture.kind == "image" else "max_pixels, total_pixels or num_frames"
        for kind, size in sizes.items():
            most = getattr(self._buckets, kind)[-1]
            if size > most:
                raise ValueError(
                    f"{picture.name}: {size:,} {kind} exceed the vision tower's largest shape of "
                    f"{most:,}; lower {wish} for it"
                )


def find_rules(loaded: Loaded) -> VisionRules | None:
    """What the checkpoint says of pictures; None (said in the log) where it says nothing."""
    if loaded.config.vision is None:
        return None
    if loaded.directory is None:
        log.info("pictures: prepared as for the published models")
        return VisionRules()
    try:
        return VisionRules.from_dir(loaded.directory, loaded.config.vision)
    except FileNotFoundError as error:
        log.info("no pictures: %s", error)
        return None
