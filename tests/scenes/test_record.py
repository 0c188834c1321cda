"""Records survive being written and read."""

import json

from rsvlm_infer.scenes.record import GridWindow, PixelWindow, WindowRecord


def test_a_record_is_the_same_after_json():
    window = PixelWindow(0, 448, 500, 512)
    record = WindowRecord(
        place=GridWindow(3, window, PixelWindow(0, 480, 480, 480)),
        text="a harbour",
        label="port",
        score=0.75,
        scores={"port": 0.75, "farmland": 0.25},
        cited=(window,),
        gsd_effective_m=1.5,
        valid_share=0.5,
        num_visual_tokens=64,
        warnings=("scaled down",),
    )
    values = json.loads(json.dumps(record.to_dict()))
    assert "timings" not in values
    assert WindowRecord.from_dict(values) == record
