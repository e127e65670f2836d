//! Noise against numbers printed by torch 2.15 on the CPU.

// The numbers as torch prints them.
#![allow(clippy::excessive_precision)]

use latile_runtime::pipeline::Generator;

fn draw(generator: &mut Generator, n: usize) -> Vec<f32> {
    let mut out = Vec::new();
    generator.randn(n, |i, v| {
        assert_eq!(i, out.len(), "in order, once each");
        out.push(v);
    });
    assert_eq!(out.len(), n);
    out
}

#[track_caller]
fn close(found: &[f32], torch: &[f32]) {
    assert_eq!(found.len(), torch.len());
    for (i, (a, b)) in found.iter().zip(torch).enumerate() {
        assert!((a - b).abs() <= 2e-6, "element {i}: {a}, torch draws {b}");
    }
}

/// `g = torch.Generator().manual_seed(42)`, then `torch.randn(n, generator=g)` for one n after the other:
/// the small path leaves a spare number to later draws, the large one makes its last 16 anew.
#[test]
#[rustfmt::skip]
fn consecutive_draws_are_those_of_torch() {
    let mut g = Generator::new(42);
    close(&draw(&mut g, 5), &[0.33669037, 0.12880941, 0.23446237, 0.23033303, -1.1228564]);
    close(&draw(&mut g, 3), &[-0.18632829, 2.2082014, -0.63799703]);
    close(&draw(&mut g, 16), &[
        1.6423169, -0.15959747, -0.49739754, 0.43958926, -0.75813115, 1.0783176, 0.80080056, 1.6806206,
        1.2791244, 1.2964228, 0.61046648, 1.3347378, -0.23162432, 0.041759491, -0.25157529, 0.85985851,
    ]);
    close(&draw(&mut g, 2), &[1.3221351, 0.81718975]);
    close(&draw(&mut g, 17), &[
        0.31888032, 1.1913691, -0.81400764, -0.73599279, -0.83712465, -0.92239004, 1.8113178, 0.16056493,
        0.36724865, 1.844594, -1.1845374, 1.3835493, -1.2024456, 0.70781225, -1.0758859, 0.53565466, 1.1753677,
    ]);
    let forty = draw(&mut g, 40);
    close(&forty[..3], &[-0.19733144, -1.0545889, 1.2779956]);
    close(&forty[22..], &[
        0.9604488, 0.40481427, 0.58863395, -0.89045691, 0.40981251, -1.4570291, -0.10233524, -0.59915304,
        0.47705641, 0.72617722, 0.23322502, 4.035634, 1.2794586, -0.012685479, 0.24083632, 0.13253537,
        0.76424062, 1.0950097,
    ]);
    close(&draw(&mut g, 1), &[-0.9648211]);
    close(&draw(&mut g, 1), &[-1.6645021]);
    let thousand = draw(&mut g, 1000);
    close(&thousand[..3], &[1.0118638, -1.4364065, -1.1298598]);
    close(&thousand[982..], &[
        -0.10754015, 0.030077493, 1.437598, 0.11150163, 1.7073947, -0.90253997, -0.2357478, -2.3812914,
        0.73333794, -1.112916, -0.39192531, 0.16057257, 2.2373695, -0.50588381, 0.10542401, -2.1039402,
        0.40704897, -0.10487241,
    ]);
}

/// `manual_seed(-1)` and `manual_seed(2**32 + 5)`.
#[test]
#[rustfmt::skip]
fn seeds_are_64_bits_of_which_32_count() {
    close(&draw(&mut Generator::new(u64::MAX), 18), &[
        -2.6642976, -1.0910486, -1.6460391, -0.53825855, 0.30621922, 0.42400301, 0.26563615, -3.1492953,
        -2.8437643, 0.94632012, -0.34029052, -0.32600823, -0.029644504, 0.38321704, -0.16095319, 1.9678915,
        1.6243832, -1.1137655,
    ]);
    close(&draw(&mut Generator::new((1 << 32) + 5), 4), &[-0.48678076, -0.60382158, -0.55809623, 0.66752428]);
    assert_eq!(draw(&mut Generator::new((1 << 32) + 5), 99), draw(&mut Generator::new(5), 99));
}

/// The words of mt19937 itself (Matsumoto and Nishimura's generator with seed 5489).
#[test]
fn words_are_those_of_mt19937() {
    let mut g = Generator::new(5489);
    assert_eq!(g.next_u32(), 3_499_211_612);
    // The standard library of C++ requires this of `std::mt19937`.
    for _ in 1..9999 {
        g.next_u32();
    }
    assert_eq!(g.next_u32(), 4_123_659_995);
}
