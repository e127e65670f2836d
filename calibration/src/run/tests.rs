//! Calibration of a network small enough to be written down.

use super::*;

#[test]
fn every_group_has_a_step_of_its_own() {
    let compvis: Vec<u32> = (0..8).rev().map(|i| i * 125 + 1).collect();
    assert_eq!(timestep_groups(1000, &compvis, 4), [250, 500, 750, 1000]);
    assert_eq!(timestep_groups(1000, &compvis, 1), [1000]);
    // Two steps cannot fill four parts.
    assert_eq!(timestep_groups(1000, &[501, 1], 4), [500, 1000]);
    assert_eq!(timestep_groups(1000, &[999], 4), [1000]);
    assert_eq!(timestep_groups(1000, &[300, 10], 4), [250, 1000]);
    assert_eq!(timestep_groups(3, &[2, 1, 0], 8), [1, 2, 3]);
    for groups in 1..=64 {
        for steps in 1..=20u32 {
            let timesteps: Vec<u32> = (0..steps).rev().map(|i| i * (1000 / steps) + 1).collect();
            let bounds = timestep_groups(1000, &timesteps, groups);
            assert!(bounds.is_sorted_by(|a, b| a < b) && bounds.last() == Some(&1000));
            let mut below = 0;
            for bound in bounds {
                assert!(timesteps.iter().any(|t| (below..bound).contains(t)), "{groups} {steps}");
                below = bound;
            }
        }
    }
}
