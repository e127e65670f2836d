//! Winograd's weights against the direct convolution.
