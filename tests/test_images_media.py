"""What callers hand over and say: content parts, data beside a prompt, options."""

import numpy as np
import pytest

from qwen_jax.prompt import media
from qwen_jax.prompt.media_options import MediaOptions, video_bounds
from qwen_jax.prompt.preprocessor import PixelRules, VideoRules

# ---- content parts ---------------------------------------------------------------------------


def one(part, **options):
    (message,), (found,) = media.take_media([{"role": "user", "content": [part]}], **options)
    return message["content"], found


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "a.png"},
        {"image": "a.png"},
        {"image_url": {"url": "a.png"}, "type": None},
    ],
)
def test_every_way_to_write_an_image_part_is_one_image(part):
    content, found = one(part)
    assert content == [{"type": "image"}]
    assert (found.kind, found.source, found.options) == ("image", "a.png", MediaOptions())
    assert found.name == "messages[0].content[0]"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4"},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"video": "a.mp4"},
    ],
)
def test_every_way_to_write_a_video_part_is_one_video(part):
    content, found = one(part)
    assert content == [{"type": "video"}]
    assert (found.kind, found.source) == ("video", "a.mp4")


def test_pictures_are_found_in_the_order_of_the_conversation():
    array = np.zeros((2, 2, 3), np.uint8)
    frames = [array, array]
    messages = [
        {"role": "system", "content": "look"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image", "image": array, "max_pixels": 4096},
                {"type": "video", "video": frames, "metadata": {"fps": 4.0}, "num_frames": 2},
            ],
        },
        {"role": "tool", "content": ({"type": "image_url", "image_url": {"url": "b"}},)},
    ]
    bare, found = media.take_media(messages)
    assert [m.name for m in found] == [
        "messages[1].content[1]",
        "messages[1].content[2]",
        "messages[2].content[0]",
    ]
    assert found[0].source is array
    assert found[0].options == MediaOptions(max_pixels=4096)
    assert found[1].source == (frames, {"fps": 4.0})
    assert found[1].options == MediaOptions(num_frames=2)
    assert bare[0] is messages[0]
    assert [p["type"] for p in bare[1]["content"]] == ["text", "image", "video"]
    assert messages[1]["content"][1]["image"] is array  # the caller's are left alone
    assert bare[2] == {"role": "tool", "content": [{"type": "image"}]}


def test_strings_go_through_the_callers_fetch():
    seen = []

    def fetch(url, name):
        seen.append((url, name))
        return b"bytes"

    assert (
        one({"type": "image_url", "image_url": {"url": "/etc/x"}}, fetch=fetch)[1].source
        == b"bytes"
    )
    assert one({"type": "image", "image": b"raw"}, fetch=fetch)[1].source == b"raw"
    assert seen == [("/etc/x", "messages[0].content[0]")]


@pytest.mark.parametrize(
    "content", ["text", None, 7, [{"type": "text", "text": "image"}], ["bare"], [{"type": "x"}], {}]
)
def test_what_holds_no_picture_is_left_for_the_templates_checks(content):
    message = {"role": "user", "content": content}
    assert media.take_media([message, "no mapping"]) == ([message, "no mapping"], [])


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"type": "image"}, r'holds no image: write \{"type": "image", "image": …\}'),
        ({"type": "image", "image": None}, "holds no image"),
        ({"type": "image", "video": "a"}, "holds no image"),
        ({"type": "image", "image": "a", "image_url": "b"}, "holds image and image_url"),
        ({"type": "image_url", "image_url": {"ur": "a"}}, r"image_url must be \{\"url\""),
        ({"type": "image_url", "image_url": {"url": 7}}, "must be"),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "max"}}, "must be"),
        ({"type": "image", "image": "a", "max_pixel": 5}, "'max_pixel'; did you mean 'max_pixels'"),
        ({"type": "image", "image": "a", "max_pixels": 0}, "max_pixels=0 is not a positive whole"),
        ({"type": "image", "image": "a", "max_pixels": True}, "max_pixels=True is not"),
        ({"type": "image", "image": "a", "max_pixels": 2.5}, r"max_pixels=2\.5 is not"),
        ({"type": "image", "image": "a", "fps": 2}, "fps says nothing of an image"),
        ({"type": "video", "video": "a", "fps": 2, "num_frames": 4}, "exclude each other"),
        ({"type": "video", "video": "a", "fps": float("nan")}, "fps=nan is not a positive number"),
        ({"type": "video", "video": "a", "do_sample_frames": 1}, "is not true or false"),
        ({"type": "image", "image": "a", "min_pixels": 9, "max_pixels": 8}, "min_pixels=9 exceeds"),
    ],
)
def test_a_wrong_part_is_named_with_its_fix(part, error):
    with pytest.raises(ValueError, match=rf"messages\[0\]\.content\[0\].*{error}"):
        one(part)


# ---- beside a prompt -------------------------------------------------------------------------


def test_multi_modal_data_holds_one_or_several():
    array, pair = np.zeros((2, 2, 3), np.uint8), (np.zeros((4, 2, 2, 3), np.uint8), {"fps": 2.0})
    found = media.media_beside({"image": ["a", array], "video": pair}, "prompt 3")
    assert [(m.kind, m.name) for m in found] == [
        ("image", "prompt 3, image 0"),
        ("image", "prompt 3, image 1"),
        ("video", "prompt 3, video 0"),
    ]
    assert found[1].source is array
    assert found[2].source is pair
    (alone,) = media.media_beside({"image": array}, "p")
    assert alone.source is array
    assert len(media.media_beside({"video": [pair, "b.mp4"]}, "p")) == 2
    assert media.media_beside({"image": None, "video": []}, "p") == []


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"images": []}, "prompt 0: unknown key 'images'.*did you mean 'image'"),
        ({"audio": []}, "unknown key 'audio'.*known: image, video"),
        (["a.png"], "multi_modal_data must be a mapping"),
    ],
)
def test_other_data_beside_a_prompt_is_refused(data, error):
    with pytest.raises(ValueError, match=error):
        media.media_beside(data, "prompt 0")


# ---- options ---------------------------------------------------------------------------------


def test_a_parts_own_options_go_before_those_for_all():
    base = MediaOptions(min_pixels=10, max_pixels=100, fps=2.0)
    assert MediaOptions(max_pixels=50).over(base) == MediaOptions(
        min_pixels=10, max_pixels=50, fps=2.0
    )
    assert MediaOptions(num_frames=8).over(base).fps is None
    assert MediaOptions(fps=1.0).over(MediaOptions(num_frames=8)).num_frames is None
    assert MediaOptions(do_sample_frames=False).over(base).do_sample_frames is False


def test_limits_of_a_frame_hold_within_the_limit_of_the_video():
    rules = VideoRules()
    assert video_bounds(rules, MediaOptions(), 10) == (4096, 25165824)
    assert video_bounds(rules, MediaOptions(total_pixels=10**6), 10) == (4096, 10**6)
    assert video_bounds(rules, MediaOptions(max_pixels=5000), 10) == (4096, 50000)
    assert video_bounds(rules, MediaOptions(max_pixels=2000), 2) == (4000, 4000)
    assert video_bounds(rules, MediaOptions(min_pixels=5000), 10) == (50000, 25165824)
    assert video_bounds(rules, MediaOptions(min_pixels=10**6), 100) == (25165824, 25165824)
    with pytest.raises(
        ValueError, match="min_pixels=5,000 for each of 10 frames exceeds total_pix"
    ):
        video_bounds(rules, MediaOptions(min_pixels=5000, total_pixels=49999), 10)
    with pytest.raises(ValueError, match=r"over 10 frames leave no room.*allow 10,240 or more"):
        video_bounds(rules, MediaOptions(total_pixels=10239), 10)


def test_the_cap_per_frame_is_that_of_transformers():
    rules = VideoRules(cap_pixels_per_frame=True)
    assert video_bounds(rules, MediaOptions(), 4)[1] == 768 * 1024 * 4  # its 768 tokens
    assert video_bounds(rules, MediaOptions(), 100)[1] == 25165824 // 100 * 100  # its share
    tight = VideoRules(
        pixels=PixelRules(min_pixels=100_000, max_pixels=400_000), cap_pixels_per_frame=True
    )
    assert video_bounds(tight, MediaOptions(), 8)[1] == 105_000 * 8  # never below the least
