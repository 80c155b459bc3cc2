"""The pictures of activations: what is drawn is what the activations compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import timm_paf
from hub.card import pafs_of
from timm_paf.plots import FEW, activations_figure, plot_activations

PANELS = {f'{name}: {timm_paf.create_paf(name).extra_repr()}': timm_paf.create_paf(name)
          for name in timm_paf.list_pafs()}


def test_many_activations_have_a_panel_each_beside_relu() -> None:
    figure = activations_figure(PANELS, span=3.0)
    assert len(figure.axes) == len(PANELS) == 8
    for axes, (name, paf) in zip(figure.axes, PANELS.items()):
        assert axes.get_title() == name.replace(': ', '\n')
        x = torch.linspace(-3, 3, 801)
        curve, relu = axes.get_lines()[-2:]  # before them the cross at the origin
        assert (curve.get_label(), relu.get_label(), relu.get_linestyle()) == (name, 'ReLU', '--')
        assert torch.equal(torch.as_tensor(relu.get_ydata()), torch.relu(x))
        for line in (curve, relu):
            assert torch.equal(torch.as_tensor(line.get_xdata()), x)
        torch.testing.assert_close(torch.as_tensor(curve.get_ydata()), paf.formula(x).detach())
    assert len({(*axes.get_xlim(), *axes.get_ylim()) for axes in figure.axes}) == 1, 'the panels have one scale'
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['activation f', 'ReLU']


@pytest.mark.parametrize('count', [1, FEW, FEW + 1, 7])
def test_as_many_panels_as_activations(count: int) -> None:
    chosen = {f'{i}': timm_paf.create_paf('pelu', alpha=i / 10) for i in range(count)}
    for given in (chosen, {**chosen, 'ReLU': torch.nn.ReLU()}):
        figure = activations_figure(given)
        if count > FEW:
            assert len(figure.axes) == count
            lowest = {axes.get_subplotspec().colspan.start: axes for axes in figure.axes}
            assert all(axes.xaxis.get_tick_params()['labelbottom'] for axes in lowest.values())
        else:
            axes, = figure.axes
            assert [text.get_text() for text in axes.get_legend().get_texts()] == [*chosen, 'ReLU']
            for line, paf in zip(axes.get_lines()[2:], chosen.values()):
                x = torch.as_tensor(line.get_xdata())
                torch.testing.assert_close(torch.as_tensor(line.get_ydata()), paf.formula(x).detach())


@pytest.mark.parametrize('count', [1, FEW + 1])
def test_values_per_channel_are_a_mean_with_their_range(count: int) -> None:
    act = timm_paf.ChannelPAF(timm_paf.create_paf('prelu', alpha=0.5), 3, 1)
    with torch.no_grad():
        act.alpha.copy_(torch.tensor([0.0, 0.25, 0.5]))
    for axes in activations_figure({f'{i}': act for i in range(count)}).axes:
        x = torch.linspace(-4, 4, 801)
        lines = {line.get_label(): torch.as_tensor(line.get_ydata()) for line in axes.get_lines()}
        mean = next(lines[name] for name in lines if name.isdecimal())
        torch.testing.assert_close(mean, x.relu() + 0.25 * x.clamp(max=0))
        shaded, = axes.collections
        assert shaded.get_datalim(axes.transData).bounds == pytest.approx((-4, -2, 8, 6))


def test_titles_fit_in_their_panels() -> None:
    name = 'PSSiLU(alpha=4.425, beta=9.066e-08) of a network with a long name'
    figure = activations_figure({f'{i} {name}: alpha 0.95, beta 0.0025': torch.nn.SiLU() for i in range(9)})
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    for axes, box in zip(figure.axes, boxes):
        frame = axes.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.width <= 1.15 * frame.width
        others = [other.get_window_extent() for other in figure.axes if other is not axes]
        assert not any(box.overlaps(other) for other in [*others, *boxes] if other is not box)


def test_the_picture_is_that_of_the_figure(tmp_path: Path) -> None:
    plot_activations(PANELS, tmp_path / 'a.png', source='the numbers')
    activations_figure(PANELS).savefig(tmp_path / 'b.png')
    with Image.open(tmp_path / 'a.png') as saved, Image.open(tmp_path / 'b.png') as drawn:
        assert saved.info['Description'] == 'the numbers'
        assert saved.width == 840, 'a page of GitHub is 838 pixels wide'
        assert saved.tobytes() == drawn.tobytes()


def test_the_pictures_of_the_bundles_stay_as_they_are(tmp_path: Path) -> None:
    for path in sorted((ROOT / 'hub' / 'models').glob('*/activation.png')):
        paf = pafs_of(timm_paf.load_bundle(path.parent))[0]
        plot_activations({f'{paf}': paf}, tmp_path / 'a.png')
        with Image.open(tmp_path / 'a.png') as drawn, Image.open(path) as kept:
            assert drawn.tobytes() == kept.tobytes(), path


@pytest.mark.gpu
def test_a_network_stays_on_its_device(tmp_path: Path) -> None:
    paf = timm_paf.create_paf('pssilu').cuda()
    plot_activations({'PSSiLU': paf}, tmp_path / 'a.png')
    assert all(p.is_cuda for p in paf.parameters())
