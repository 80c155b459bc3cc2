import re

import pytest

from hub.progress import ProgressBar


@pytest.mark.parametrize('before', [0, 5_000])  # what an earlier process did
def test_remaining_time_is_of_the_work_and_not_of_the_compiler(before: int) -> None:
    clock = 0.0
    with ProgressBar('attacks', 10_000, before) as bar:
        bar._time = lambda: clock
        bar.start_t = bar.last_print_t = clock
        clock = 120.0
        bar.show(before)  # another process may show that nothing is done yet
        clock = 240.0  # four minutes of compiling, the first batch too
        bar.show(before + 200, 'clean attack: 75.6% of 250 right')
        assert re.fullmatch(r'attacks: .*\| 00:00<\?, clean attack: 75.6% of 250 right', str(bar))
        for _ in range(20):
            clock += 40.0
            bar.show(bar.n + 100)
        assert bar.n == before + 2_200
        minutes, seconds = divmod((10_000 - bar.n) * 40 // 100, 60)
        remaining = f'{minutes:02d}:{seconds:02d}'
        assert re.fullmatch(rf'attacks: .*\| 13:20<{remaining}, ', f'{bar}, ')
