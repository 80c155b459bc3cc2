import re

from hub.progress import progress_bar, show_progress


def test_remaining_time_is_of_the_work_and_not_of_the_compiler(capsys):
    with progress_bar('attacks', 10_000) as bar:
        bar.start_t -= 240  # four minutes of compiling
        show_progress(bar, 3, 'clean attack: 75.6% of 250 right')
        assert re.fullmatch(r'attacks:   0%\|.*\| 04:0\d, clean attack: 75.6% of 250 right', str(bar))
        show_progress(bar, 5_000)
        assert re.search(r'50%\|.*\| 04:0\d<\d\d:\d\d', str(bar))


def test_what_an_earlier_process_did_says_nothing_of_the_remaining_time():
    with progress_bar('attacks', 10_000, done=5_000) as bar:
        bar.start_t -= 240
        show_progress(bar, 5_003)
        assert re.fullmatch(r'attacks:  50%\|.*\| 04:0\d', str(bar))
