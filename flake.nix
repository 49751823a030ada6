{
  description = "Kimi Delta Attention for NVIDIA GPUs and CPUs, as a Hub kernel";

  inputs = {
    kernel-builder.url = "github:huggingface/kernels/release-0.16";
  };

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
