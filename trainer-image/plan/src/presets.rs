//! Shapes of known models, by the keys of the 2023 ColossalAI benchmarks: the GPT-2 family from 124 million to 175 billion
//! parameters, and OPT.

use rlhf_api::model::{Mlp, ModelSpec, Norm, Positions};

/// `(key, hidden, layers, heads, positions)` of the GPT dummy benchmark; the vocabulary is GPT-2's.
const GPT: [(&str, i64, usize, i64, i64); 19] = [
    ("s", 768, 12, 12, 1024),
    ("m", 1024, 24, 16, 1024),
    ("l", 1280, 36, 20, 1024),
    ("xl", 1600, 48, 25, 1024),
    ("2b", 2048, 40, 16, 1024),
    ("4b", 2304, 64, 16, 1024),
    ("6b", 4096, 30, 16, 1024),
    ("8b", 4096, 40, 16, 1024),
    ("10b", 4096, 50, 16, 1024),
    ("12b", 4096, 60, 16, 1024),
    ("15b", 4096, 78, 16, 1024),
    ("18b", 4096, 90, 16, 1024),
    ("20b", 8192, 25, 16, 1024),
    ("24b", 8192, 30, 16, 1024),
    ("28b", 8192, 35, 16, 1024),
    ("32b", 8192, 40, 16, 1024),
    ("36b", 8192, 45, 16, 1024),
    ("40b", 8192, 50, 16, 1024),
    ("175b", 12288, 96, 96, 2048),
];

/// `(key, hidden, layers, heads)` of the OPT benchmark, whose feed-forward networks are four times as wide as the model.
const OPT: [(&str, i64, usize, i64); 10] = [
    ("opt-125m", 768, 12, 12),
    ("opt-350m", 1024, 24, 16),
    ("opt-700m", 1280, 36, 20),
    ("opt-1.3b", 2048, 24, 32),
    ("opt-2.7b", 2560, 32, 32),
    ("opt-3.5b", 3072, 32, 32),
    ("opt-5.5b", 3840, 32, 32),
    ("opt-6.7b", 4096, 32, 32),
    ("opt-10b", 5120, 32, 32),
    ("opt-13b", 5120, 40, 40),
];

/// All keys, smallest first in each family.
pub fn keys() -> impl Iterator<Item = &'static str> {
    GPT.iter().map(|p| p.0).chain(OPT.iter().map(|p| p.0))
}

/// The shape of the model with this key.
pub fn preset(key: &str) -> Option<ModelSpec> {
    let gpt = GPT.iter().find(|p| p.0 == key).map(|&(_, h, l, n, p)| gpt2(50257, h, l, n, p));
    // OPT's positions begin at 2, so its table has two rows more.
    gpt.or_else(|| OPT.iter().find(|p| p.0 == key).map(|&(_, h, l, n)| gpt2(50272, h, l, n, 2050)))
}

/// A model of GPT-2's kind: learned positions, layer norms, biases everywhere, output weights tied to the embedding.
fn gpt2(vocab: i64, hidden: i64, layers: usize, heads: i64, max_positions: i64) -> ModelSpec {
    ModelSpec {
        vocab,
        hidden,
        layers,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        ffn: 4 * hidden,
        max_positions,
        norm: Norm::Layer,
        norm_eps: 1e-5,
        positions: Positions::Learned,
        mlp: Mlp::Gelu,
        qkv_bias: true,
        attention_output_bias: true,
        mlp_bias: true,
        tied_head: true,
        ..ModelSpec::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::model::HeadKind;

    /// V h + P h + L (12 h^2 + 13 h) + 2 h, as the benchmark's table has it.
    #[test]
    fn presets_have_the_parameters_of_the_benchmark() {
        for (key, parameters) in [
            ("s", 124_439_808),
            ("m", 354_823_168),
            ("l", 774_030_080),
            ("xl", 1_557_611_200),
            ("2b", 2_119_358_464),
            ("4b", 4_196_936_448),
            ("6b", 6_251_450_368),
            ("8b", 8_265_248_768),
            ("10b", 10_279_047_168),
            ("12b", 12_292_845_568),
            ("15b", 15_917_682_688),
            ("18b", 18_334_240_768),
            ("20b", 20_555_431_936),
            ("24b", 24_582_496_256),
            ("28b", 28_609_560_576),
            ("32b", 32_636_624_896),
            ("36b", 36_663_689_216),
            ("40b", 40_690_753_536),
            ("175b", 174_604_259_328),
        ] {
            assert_eq!(preset(key).unwrap().parameter_count(HeadKind::Lm), parameters, "{key}");
        }
        assert_eq!(keys().count(), 29);
        assert!(keys().all(|key| preset(key).is_some()));
        assert!(preset("9b").is_none());
    }
}
