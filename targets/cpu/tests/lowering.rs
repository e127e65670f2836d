//! Lowered networks against the reference executor: each pattern that is fused, and some that are not.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/compare.rs"]
mod compare;

use common::Net;
use compare::{check, inputs, run};
use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::Session;
use latile_runtime::format::Role;
use latile_runtime::graph::Pad;
use latile_runtime::tensor::DType;

/// Norms, activations and attention round differently from the f64 reference: a few units in the last place.
const F32: f32 = 1e-5;
/// A difference in the last bit of f32 may turn a stored f16 over to its neighbour, 2⁻¹¹ away, and layers
/// that follow add such differences up.
const F16: f32 = 2e-3;

/// Runs the pattern in both precisions.
fn both(h: usize, w: usize, build: impl Fn(&mut Net)) {
    for (dtype, tolerance) in [(DType::F32, F32), (DType::F16, F16)] {
        let mut net = Net::new(dtype, 1);
        build(&mut net);
        check(&net, h, w, tolerance);
    }
}

/// Where only convolutions and sums are at work, orders agree and so do bits, in int8 too.
fn exact(h: usize, w: usize, build: impl Fn(&mut Net)) {
    for dtype in [DType::F32, DType::F16] {
        for int8 in [None, Some(false), Some(true)] {
            let mut net = Net::new(dtype, 2);
            net.int8 = int8;
            build(&mut net);
            check(&net, h, w, 0.0);
        }
    }
}

#[test]
fn a_convolution_alone() {
    for (k, stride, pad) in [
        (1, 1, Pad::default()),
        (3, 1, Pad::all(1)),
        (3, 2, Pad::all(1)),
        (3, 2, Pad { bottom: 1, right: 1, ..Pad::default() }),
        (5, 3, Pad::all(2)),
        (4, 2, Pad::all(1)),
        (3, 1, Pad::default()),
    ] {
        exact(7, 9, |net| {
            let x = net.map("x", 5);
            let y = net.conv(x, 19, k, stride, pad);
            net.output("y", y);
        });
    }
}

#[test]
fn a_linear_layer_over_a_map() {
    exact(3, 5, |net| {
        let x = net.map("x", 33);
        let y = net.linear(x, 17, true);
        let z = net.linear(y, 20, false);
        net.output("z", z);
    });
}

#[test]
fn upsampling_before_a_convolution() {
    exact(4, 5, |net| {
        let x = net.map("x", 6);
        let u = net.upsample(x);
        let y = net.conv3(u, 16);
        net.output("y", y);
    });
}

#[test]
fn concatenation_before_a_convolution() {
    exact(5, 5, |net| {
        let a = net.map("a", 3);
        let b = net.map("b", 18);
        let c = net.map("c", 1);
        let x = net.concat(&[a, b, c, a]);
        let y = net.conv3(x, 7);
        net.output("y", y);
    });
}

#[test]
fn groups_of_timesteps_have_ranges_of_their_own() {
    let mut net = Net::new(DType::F16, 11);
    net.int8 = Some(true);
    net.timestep_groups = vec![20, 400, 900];
    let x = net.map("x", 6);
    let t = net.vector("time_proj", 4);
    let h = net.conv3(x, 9);
    let h = net.linear(h, 18, true);
    let v = net.linear(t, 18, true);
    let h = net.add_channel(h, v);
    net.output("y", h);
    check(&net, 5, 4, 1e-6);

    // Each group gives something else, the first is the default, and beyond the last is the last.
    let model = net.model();
    let given = inputs(&model, 5, 4, 3);
    let backend = CpuBackend::new(1, Level::best()).unwrap();
    let mut session = backend.session(&model, Role::Decoder, 5, 4).unwrap();
    let first = run(&mut session, &given);
    let mut of = |group| {
        session.set_timestep_group(group);
        run(&mut session, &given)
    };
    let groups: Vec<_> = (0..3).map(&mut of).collect();
    assert_eq!(groups[0], first);
    assert!(groups[0] != groups[1] && groups[1] != groups[2] && groups[0] != groups[2]);
    assert_eq!(of(3), groups[2]);
    assert_eq!(of(usize::MAX), groups[2]);
    assert_eq!(of(0), first);
}

#[test]
fn residual_sums() {
    // In place where the shortcut dies, not where it lives on, never where it is the input.
    exact(6, 5, |net| {
        let x = net.map("x", 8);
        let h = net.conv3(x, 8);
        let skip = net.conv1(x, 8);
        let y = net.add(skip, h);
        let z = net.conv3(y, 8);
        let z = net.add(z, y);
        let w = net.add(z, y);
        let twice = net.add(w, w);
        net.output("w", w);
        net.output("twice", twice);
    });
}

#[test]
fn an_output_scale() {
    exact(6, 5, |net| {
        let x = net.map("x", 8);
        let h = net.conv3(x, 8);
        let y = net.add(h, x);
        let y = net.affine(y, 0.75, 0.0);
        let z = net.conv3(y, 4);
        let z = net.affine(z, 0.5, 0.0);
        net.output("z", z);
    });
}

#[test]
fn a_latent_rescaled_before_its_first_layer() {
    exact(4, 4, |net| {
        let x = net.map("x", 4);
        let s = net.affine(x, 5.5, -0.25);
        let y = net.conv3(s, 20);
        net.output("y", y);
    });
}

#[test]
fn a_vector_added_to_channels() {
    both(5, 4, |net| {
        let x = net.map("x", 6);
        let t = net.vector("time_proj", 10);
        let t = net.linear(t, 24, true);
        let t = net.silu(t);
        let t = net.linear(t, 24, true);
        let once = net.silu(t);
        let a = net.linear(once, 12, true);
        let b = net.linear(once, 12, false);
        let h = net.conv3(x, 12);
        let h = net.add_channel(h, a);
        // Read twice, so that the second vector cannot become an epilogue.
        let g = net.add_channel(h, b);
        let y = net.conv3(g, 5);
        net.output("y", y);
        net.output("g", g);
    });
}

#[test]
fn a_resnet_block() {
    both(6, 7, |net| {
        let x = net.map("x", 16);
        let t = net.vector("t", 12);
        let y = net.resnet(x, 24, 4, Some(t));
        let z = net.resnet(y, 24, 8, Some(t));
        net.output("z", z);
    });
}

#[test]
fn a_skip_connection_is_normalised_across_its_parts() {
    // Three groups over 10 + 2 channels: the second and third span or leave the seam.
    both(5, 6, |net| {
        let x = net.map("x", 10);
        let a = net.conv3(x, 10);
        let b = net.conv3(x, 2);
        let c = net.concat(&[a, b]);
        let y = net.resnet(c, 9, 3, None);
        let d = net.concat(&[y, x, b]);
        let z = net.resnet(d, 6, 3, None);
        net.output("z", z);
    });
}

#[test]
fn scale_and_shift_of_a_norm() {
    both(6, 6, |net| {
        let x = net.map("x", 12);
        let t = net.vector("t", 8);
        let t = net.silu(t);
        let v = net.linear(t, 24, true);
        let h = net.group_norm(x, 3);
        let h = net.scale_shift(h, v);
        let h = net.silu(h);
        let y = net.conv3(h, 10);
        // Without a norm, and with one that is stored.
        let h = net.scale_shift(x, v);
        let z = net.conv3(h, 10);
        let n = net.group_norm(x, 2);
        let m = net.scale_shift(n, v);
        net.output("y", y);
        net.output("z", z);
        net.output("n", n);
        net.output("m", m);
    });
}

#[test]
fn attention_with_its_norm_and_residual() {
    both(5, 3, |net| {
        let x = net.map("x", 16);
        let x = net.conv3(x, 24);
        let y = net.attention_block(x, 4, 3);
        let y = net.affine(y, 0.707, 0.0);
        let z = net.attention_block(y, 4, 1);
        net.output("z", z);
    });
}

#[test]
fn attention_in_int8() {
    // Exact like the layers around it, in several blocks of keys and with fewer keys than queries.
    for dtype in [DType::F32, DType::F16] {
        let mut net = Net::new(dtype, 5);
        net.int8 = Some(false);
        let x = net.map("x", 5);
        let q = net.conv3(x, 20);
        let k = net.conv3(x, 20);
        let v = net.conv3(x, 20);
        let y = net.attention(q, k, v, 2);
        let y = net.conv3(y, 12);
        let small = net.avg_pool(y);
        let z = net.attention(y, small, small, 1);
        net.output("z", z);
        check(&net, 20, 18, 0.0);
    }
}

#[test]
fn cross_sized_attention() {
    both(6, 4, |net| {
        let x = net.map("x", 8);
        let small = net.avg_pool(x);
        let y = net.attention(x, small, small, 2);
        net.output("y", y);
    });
}

#[test]
fn blocks_that_change_the_resolution() {
    // diffusers' resblock_updown: norm, SiLU, then pooling or doubling on both paths.
    both(8, 6, |net| {
        let x = net.map("x", 8);
        let h = net.group_norm(x, 2);
        let h = net.silu(h);
        let h = net.avg_pool(h);
        let s = net.avg_pool(x);
        let h = net.conv3(h, 8);
        let d = net.add(s, h);
        let h = net.group_norm(d, 2);
        let h = net.silu(h);
        let up = net.upsample(h);
        let s = net.upsample(d);
        let g = net.conv3(up, 8);
        let u = net.add(s, g);
        net.output("u", u);
        // The same in one, of what is one map and of what is two; and of a map that is upsampled before.
        let g = net.up_conv(h, 8);
        let u = net.add(s, g);
        net.output("in one", u);
        let two = net.concat(&[d, h]);
        let g = net.up_conv(two, 20);
        net.output("of two", g);
        let g = net.up_conv(up, 5);
        net.output("again", g);
    });
}

#[test]
fn a_decoder_with_its_codebook() {
    both(4, 4, |net| {
        let z = net.map("latents", 3);
        let q = net.codebook(z, 37);
        let h = net.conv1(q, 3);
        let h = net.conv3(h, 16);
        let h = net.resnet(h, 16, 4, None);
        let h = net.attention_block(h, 4, 1);
        let h = net.resnet(h, 16, 4, None);
        let h = net.upsample(h);
        let h = net.conv3(h, 16);
        let h = net.resnet(h, 8, 4, None);
        let h = net.group_norm(h, 4);
        let h = net.silu(h);
        let y = net.conv3(h, 3);
        net.output("sample", y);
    });
}

#[test]
fn element_wise_operators_on_their_own() {
    both(3, 5, |net| {
        let x = net.map("x", 6);
        let t = net.vector("t", 6);
        let a = net.silu(x);
        let b = net.silu(a);
        let c = net.affine(b, -1.5, 0.5);
        let d = net.add(c, x);
        let e = net.concat(&[d, a]);
        let f = net.upsample(e);
        let g = net.upsample(f);
        let k = net.add_channel(d, t);
        let n = net.group_norm(k, 1);
        let n = net.group_norm(n, 6);
        let v = net.silu(t);
        let v = net.affine(v, 2.0, 1.0);
        net.output("g", g);
        net.output("n", n);
        net.output("k", k);
        net.output("v", v);
        net.output("x", x);
        net.output("t", t);
        net.output("g again", g);
    });
}

#[test]
fn one_pixel_and_one_channel() {
    both(1, 1, |net| {
        let x = net.map("x", 1);
        let h = net.conv3(x, 1);
        let h = net.upsample(h);
        let h = net.group_norm(h, 1);
        let h = net.silu(h);
        let y = net.conv3(h, 1);
        net.output("y", y);
    });
}

#[test]
fn a_vector_added_to_what_is_stored_anyway() {
    both(2, 7, |net| {
        let x = net.map("x", 8);
        let t = net.vector("t", 6);
        let h = net.conv3(x, 4);
        let g = net.conv3(h, 4);
        let v = net.silu(t);
        let v = net.linear(v, 4, true);
        let y = net.add_channel(h, v);
        net.output("g", g);
        net.output("y", y);
    });
}

#[test]
fn a_norm_of_codebook_rows() {
    both(2, 2, |net| {
        let x = net.map("x", 4);
        let q = net.codebook(x, 9);
        let m = net.conv3(q, 4);
        let y = net.group_norm(q, 1);
        net.output("y", y);
        net.output("m", m);
    });
}
