//! Hand-computed cases; everything else is compared with these operators.

use super::ops;
use latile_runtime::graph::QuantRange;
use latile_runtime::tensor::Shape;

fn map(h: usize, w: usize, c: usize) -> Shape {
    Shape::Map { h, w, c }
}

#[test]
fn a_convolution_slides_and_pads() {
    // One channel, 2x2, kernel 3x3 of ones, pad 1: every output sees all four pixels.
    let window = ops::Window { kernel: [3, 3], stride: [1, 1], top: 1, left: 1, phases: false };
    let x = [1.0, 2.0, 3.0, 4.0];
    let y = ops::conv2d(&x, map(2, 2, 1), &[1.0; 9], &[0.5], window, map(2, 2, 1));
    assert_eq!(y, [10.5; 4]);
    // Cross-correlation, not convolution: only the tap to the right of the centre.
    let mut right = [0.0; 9];
    right[5] = 1.0;
    let y = ops::conv2d(&x, map(2, 2, 1), &right, &[0.0], window, map(2, 2, 1));
    assert_eq!(y, [2.0, 0.0, 4.0, 0.0]);
    // Padding below and to the right only, stride 2 (diffusers' Downsample2D of a VAE).
    let corner = ops::Window { stride: [2, 2], top: 0, left: 0, ..window };
    let y = ops::conv2d(&x, map(2, 2, 1), &[1.0; 9], &[0.0], corner, map(1, 1, 1));
    assert_eq!(y, [10.0]);
}

#[test]
fn a_linear_layer_is_row_times_matrix() {
    let window = ops::Window { kernel: [1, 1], stride: [1, 1], top: 0, left: 0, phases: false };
    let (x, weight) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
    let y = ops::conv2d(&x, map(1, 2, 2), &weight, &[0.0, 0.0, 10.0], window, map(1, 2, 3));
    assert_eq!(y, [1.0, 2.0, 13.0, 3.0, 4.0, 17.0]);
}

#[test]
fn an_int8_layer_quantizes_its_input_and_scales_its_sums() {
    // 0.5 / 0.25 is 2; 0.375 / 0.25 is 1.5, of which the even neighbour is 2; -9 is cut off at -3 by a
    // zero point of 3, and 1e9 at 252.
    let window = ops::Window { kernel: [1, 1], stride: [1, 1], top: 0, left: 0, phases: false };
    let layer = ops::Int8 {
        weight: &[1.0, -127.0],
        weight_scale: &[0.5],
        input_scale: None,
        ranges: &[QuantRange { scale: 0.25, zero_point: 3 }],
    };
    let x = [0.5, 0.375, -9.0, 1e9, f32::NAN, 0.0];
    let y = ops::conv2d_int8(&x, map(1, 3, 2), &layer, &[10.0], window, map(1, 3, 1));
    let worth = 0.125;
    assert_eq!(y, [10.0 + (2.0 - 254.0) * worth, 10.0 + (-3.0 - 127.0 * 252.0) * worth, 10.0]);
    // Factors of input channels come first.
    let scaled = ops::Int8 { input_scale: Some(&[2.0, 0.0]), ..layer };
    let y = ops::conv2d_int8(&x, map(1, 3, 2), &scaled, &[0.0], window, map(1, 3, 1));
    assert_eq!(y, [4.0 * worth, -3.0 * worth, 0.0]);
    // Padding is zero, whatever the zero point.
    let padded = ops::Window { top: 1, left: 1, ..window };
    let y = ops::conv2d_int8(&x[..2], map(1, 1, 2), &layer, &[7.0], padded, map(1, 1, 1));
    assert_eq!(y, [7.0]);
}

#[test]
fn a_group_norm_has_mean_zero_and_variance_one_in_each_group() {
    // Two pixels, two groups of one channel.
    let y = ops::group_norm(&[1.0, 10.0, 3.0, 30.0], 2, 2, 0.0, &[1.0, 2.0], &[0.0, 5.0]);
    assert_eq!(y, [-1.0, 3.0, 1.0, 7.0]);
    // One group over both channels: mean 4, variance 9 + 9 + 1 + 1 over 4.
    let y = ops::group_norm(&[1.0, 7.0, 3.0, 5.0], 2, 1, 0.0, &[1.0; 2], &[0.0; 2]);
    let s = 1.0 / 5.0f32.sqrt();
    for (a, b) in y.iter().zip([-3.0 * s, 3.0 * s, -s, s]) {
        assert!((a - b).abs() < 1e-6);
    }
}

#[test]
fn attention_of_one_key_is_its_value_and_of_equal_keys_the_mean() {
    let one = ops::attention(&[3.0, 1.0], &[5.0, 2.0], &[7.0, 8.0], 2, 2, 1.0);
    assert_eq!(one, [7.0, 8.0]);
    let even = ops::attention(&[1.0, 2.0], &[1.0, 1.0, 1.0, 1.0], &[2.0, 0.0, 4.0, 2.0], 2, 1, 0.7);
    assert_eq!(even, [3.0, 1.0]);
    // Scores ln 3 and 0: weights 3/4 and 1/4.
    let skew = ops::attention(&[1.0], &[3.0f32.ln(), 0.0], &[4.0, 8.0], 1, 1, 1.0);
    assert!((skew[0] - 5.0).abs() < 1e-6);
}

#[test]
fn small_operators() {
    assert_eq!(ops::silu(0.0), 0.0);
    assert!((ops::silu(1.0) - 0.731_058_6).abs() < 1e-6);
    assert_eq!(ops::silu(-1e30), 0.0);
    assert_eq!(ops::scale_shift(&[1.0, 2.0], &[1.0, 0.0, 10.0, 20.0]), [12.0, 22.0]);
    assert_eq!(
        ops::concat(&[(&[1.0, 2.0], 1), (&[3.0, 4.0, 5.0, 6.0], 2)], 2),
        [1.0, 3.0, 4.0, 2.0, 5.0, 6.0]
    );
    assert_eq!(
        ops::upsample2x(&[1.0, 2.0], map(1, 2, 1)),
        [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0]
    );
    assert_eq!(ops::avg_pool2x(&[1.0, 2.0, 9.0, 3.0, 6.0, 9.0], map(2, 3, 1)), [3.0]);
    // 0.5 lies between both rows: the first wins.
    assert_eq!(ops::codebook(&[0.5, 0.9], &[0.0, 1.0, 2.0], 1), [0.0, 1.0]);
}

#[test]
fn a_doubling_convolution_has_four_windows_for_each_pixel() {
    // Of phase (py, px) one output channel, and fifteen that fill its panel: tap k has the weight 10^k, the
    // phase counts thousands in the bias.
    let weight: Vec<f32> = (0..64)
        .flat_map(|f| if f % 16 == 0 { [1.0, 10.0, 100.0, 1000.0] } else { [f32::NAN; 4] })
        .collect();
    let bias: Vec<f32> =
        (0..64).map(|f| if f % 16 == 0 { f as f32 * 625.0 } else { 9.0 }).collect();
    let window = ops::Window { kernel: [2, 2], stride: [1, 1], top: 1, left: 1, phases: true };
    let got = ops::conv2d(&[1.0, 2.0], map(1, 2, 1), &weight, &bias, window, map(2, 4, 1));
    // The row above and below is 0, as are the columns left and right.
    let expected = [
        [1000.0, 100.0 + 2000.0, 1000.0 * 2.0 + 100.0, 200.0],
        [10.0, 1.0 + 20.0, 20.0 + 1.0, 2.0],
    ];
    let biased = |y: usize, x: usize| expected[y][x] + 10_000.0 * (2 * y + x % 2) as f32;
    let expected: Vec<f32> = (0..8).map(|i| biased(i / 4, i % 4)).collect();
    assert_eq!(got, expected);
}
