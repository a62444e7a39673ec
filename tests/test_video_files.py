"""Video files: every frame that was written comes out, and broken ones are refused by name."""

import io
import logging
import struct

import numpy as np
import pytest
import vision_samples as samples
from test_video import clip, numbered, numbers

pytest.importorskip("PIL", reason="needs the extra 'vision'")
av = pytest.importorskip("av", reason="needs the extra 'video'")


def written(
    frames: np.ndarray, *, kind: str = "mp4", codec: str = "libx264rgb", rate: int = 10
) -> bytes:
    """A video file that loses nothing: H.264 in RGB, or FFV1 in Matroska."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        options = {"crf": "0"} if codec == "libx264rgb" else {}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"libx264rgb": "rgb24", "ffv1": "bgr0"}[codec]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "libx264rgb"), ("matroska", "ffv1")])
def test_a_file_gives_the_frames_that_were_written(kind, codec, tmp_path):
    frames = numbered(40)
    raw = written(frames, kind=kind, codec=codec)
    expected = clip((frames, {"fps": 10.0}))
    path = tmp_path / "a video.bin"
    path.write_bytes(raw)
    for source in (raw, path, str(path), path.as_uri()):
        found = clip(source)
        np.testing.assert_array_equal(found.frames, expected.frames)
        assert found.timestamps == expected.timestamps


def test_options_reach_files():
    raw = written(numbered(40))
    assert numbers(clip(raw, num_frames=3).frames) == [0, 20, 39]
    assert len(clip(raw, fps=5.0).frames) == 20
    assert numbers(clip(raw, do_sample_frames=False).frames) == list(range(40))
    assert clip(raw, num_frames=4, total_pixels=4 * 32 * 32).frames.shape == (4, 32, 32, 3)


def test_frames_of_a_file_are_resized_as_frames_are():
    frames = samples.noise(6, 100, 150, 3, seed=21)
    found = clip(written(frames), num_frames=5)
    expected = clip((frames, {"fps": 10.0}), num_frames=5)
    assert found.frames.shape == (5, 96, 160, 3)
    np.testing.assert_array_equal(found.frames, expected.frames)


def test_a_stored_rotation_is_undone():
    frames = samples.noise(6, 64, 96, 3, seed=22)
    raw = bytearray(written(frames))
    header = raw.index(b"tkhd") + 4
    matrix = header + 4 + 20 + 8 + 8  # version and flags, times and ids, reserved, layer and volume
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    raw[matrix : matrix + 36] = quarter
    found = clip(bytes(raw), do_sample_frames=False).frames
    assert found.shape == (6, 96, 64, 3)
    np.testing.assert_array_equal(found, np.rot90(frames, k=-1, axes=(1, 2)))  # to the right


def test_a_file_that_announces_too_many_frames_is_sampled_by_those_it_has(caplog):
    frames = numbered(40)
    raw = written(frames, kind="matroska", codec="ffv1")
    cut = raw[: int(len(raw) * 0.6)]
    with caplog.at_level(logging.WARNING):
        found = clip(cut)
    assert not caplog.records  # Matroska counts nothing: what is there is the video
    assert 0 < numbers(found.frames)[-1] < 39

    from qwen_jax.prompt import video_files

    real = video_files.probe
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(
            video_files,
            "probe",
            lambda *a: video_files.dataclasses.replace(real(*a), frames=55),
        )
        found = clip(raw)
    assert numbers(found.frames)[-1] == 39
    assert "video 0 announces 55 frames, 40 decode" in caplog.text


def test_broken_files_are_refused_by_name():
    raw = written(numbered(40))
    for source in (b"", b"hello" * 99, raw[: len(raw) // 2], b"#EXTM3U\n#EXTINF:1,\nfile:///a\n"):
        with pytest.raises(ValueError, match=r"video 0 cannot be decoded \(.*write it again"):
            clip(source)
    with pytest.raises(ValueError, match=r"video 0: there is no file 'nowhere\.mp4'"):
        clip("nowhere.mp4")
    with pytest.raises(ValueError, match=r"video 0: .*is not fetched"):
        clip("https://example.org/a.mp4")


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_damaged_bytes_never_raise_anything_but_a_named_error(kind):
    raw = written(numbered(12, 32, 64), kind=kind)
    for at in range(0, len(raw), max(1, len(raw) // 80)):
        broken = bytearray(raw)
        broken[at] ^= 0xFF
        try:
            frames = clip(bytes(broken)).frames
        except ValueError as raised:
            message = str(raised)
        else:
            message = f"video 0: still {len(frames)} frames"
        assert message.startswith("video 0")


def test_a_sound_is_no_video():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="video 0 has no video stream"):
        clip(file.getvalue())


def test_a_file_without_a_rate_is_refused(monkeypatch):
    raw = written(numbered(8))

    class NoRate:
        average_rate = None

    class Container:
        streams = type("Streams", (), {"video": [NoRate()]})()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(av, "open", lambda *a, **k: Container())
    with pytest.raises(ValueError, match=r"video 0 has no frame rate: decode it yourself and give"):
        clip(raw)


def test_frames_beyond_all_measure_are_refused(monkeypatch):
    from qwen_jax.prompt import video_files

    monkeypatch.setattr(video_files, "MAX_FRAME_PIXELS", 64 * 96 - 1)
    with pytest.raises(ValueError, match="video 0 has frames of 96x64 pixels, the limit is 6,143"):
        clip(written(numbered(8)))
