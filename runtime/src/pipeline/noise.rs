//! Gaussian noise equal to `torch.randn` on the CPU, so that a run can be compared with one in PyTorch.
//!
//! Lives here: mt19937 (Matsumoto & Nishimura 1998) seeded as torch seeds it, and the two ways in which
//! torch makes f32 normals of it (Box & Muller 1958): a whole field of 16 numbers or more is made in groups
//! of 16 from 24-bit uniforms; a smaller one number by number from 53-bit uniforms, the sine of each pair
//! kept for the next call. Values differ from torch's by a few 1e-7, because torch's own logarithm, sine
//! and cosine differ between instruction sets; here they come from `libm` and are the same everywhere.

/// State words of mt19937.
const WORDS: usize = 624;
/// Distance of the word that is mixed into the next state.
const MIDDLE: usize = 397;
/// Normals made together when a field has at least as many.
const GROUP: usize = 16;
/// 2π rounded to f32, as torch multiplies it into the angle.
const TWO_PI: f32 = core::f32::consts::TAU;

/// A random generator that yields what `torch.Generator().manual_seed(seed)` yields.
#[derive(Clone, Debug)]
pub struct Generator {
    state: [u32; WORDS],
    next: usize,
    /// The second normal of a pair, made but not yet drawn.
    spare: Option<f64>,
}

impl Generator {
    /// A generator with `seed`, of which mt19937 takes the low 32 bits, as torch does.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut state = [0u32; WORDS];
        state[0] = seed as u32;
        for i in 1..WORDS {
            let previous = state[i - 1];
            state[i] =
                (previous ^ (previous >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Self { state, next: WORDS, spare: None }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == WORDS {
            self.refill();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn refill(&mut self) {
        for i in 0..WORDS {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % WORDS] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + MIDDLE) % WORDS] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// Uniform in [0, 1) with 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in [0, 1) with 53 bits, the first word drawn being the high one.
    fn uniform_f64(&mut self) -> f64 {
        let bits = u64::from(self.next_u32()) << 32 | u64::from(self.next_u32());
        (bits & ((1 << 53) - 1)) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// Draws `torch.randn(n)`: calls `put(i, value)` for `i` in `0..n`, in order, once each.
    pub fn randn(&mut self, n: usize, mut put: impl FnMut(usize, f32)) {
        if n < GROUP {
            for i in 0..n {
                let value = self.normal_f64();
                put(i, value as f32);
            }
            return;
        }
        // Where n is not a multiple of 16, torch draws n uniforms, then makes the last 16 values anew
        // from 16 more.
        let whole = n - n % GROUP;
        let kept = if whole == n { n } else { n - GROUP };
        for start in (0..whole).step_by(GROUP) {
            for (i, value) in (start..kept).zip(self.group()) {
                put(i, value);
            }
        }
        if whole != n {
            for _ in whole..n {
                self.next_u32();
            }
            for (i, value) in (kept..n).zip(self.group()) {
                put(i, value);
            }
        }
    }

    /// Sixteen normals from sixteen uniforms: element `j` of the first half gives the radius, its partner
    /// in the second half the angle.
    fn group(&mut self) -> [f32; GROUP] {
        let mut data = [0f32; GROUP];
        for value in &mut data {
            *value = self.uniform_f32();
        }
        let (radii, angles) = data.split_at_mut(GROUP / 2);
        for (a, b) in radii.iter_mut().zip(angles) {
            let radius = (-2.0 * libm::logf(1.0 - *a)).sqrt();
            let angle = TWO_PI * *b;
            *a = radius * libm::cosf(angle);
            *b = radius * libm::sinf(angle);
        }
        data
    }

    fn normal_f64(&mut self) -> f64 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        let angle = core::f64::consts::TAU * self.uniform_f64();
        let radius = (-2.0 * libm::log1p(-self.uniform_f64())).sqrt();
        self.spare = Some(radius * libm::sin(angle));
        radius * libm::cos(angle)
    }
}
