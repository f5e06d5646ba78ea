# psbn_mmdet with the versions of requirements.txt and mmcv's operators, compiled.
#
#     docker build -t psbn_mmdet .
#     docker run --gpus all --shm-size 8g -v /data/coco:/data/coco -v $PWD/work_dirs:/psbn_mmdet/work_dirs \
#         psbn_mmdet tools/dist_train.sh configs/retinanet/retinanet_psbn_500.py 8 --data-root /data/coco
#
# The operators are compiled for the GPUs of TORCH_CUDA_ARCH_LIST. For a CPU alone, without nvcc:
#
#     docker build -t psbn_mmdet:cpu --build-arg BASE=python:3.11-bookworm \
#         --build-arg INDEX=https://download.pytorch.org/whl/cpu --build-arg CUDA=0 .
ARG BASE=nvidia/cuda:12.6.3-cudnn-devel-ubuntu24.04
FROM ${BASE}
ARG INDEX=https://download.pytorch.org/whl/cu126
ARG CUDA=1
ARG TORCH_CUDA_ARCH_LIST="7.0;8.0;8.6;9.0"
ENV DEBIAN_FRONTEND=noninteractive FORCE_CUDA=${CUDA} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST}
RUN apt-get update -q \
    && apt-get install -y -q --no-install-recommends \
        git g++ python3 python3-dev python3-venv libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /psbn_mmdet
COPY . .
# torch first, from the index that has it for this GPU or for none; setup.sh keeps what is there
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir "$(grep '^torch==' requirements.txt)" --index-url ${INDEX} \
    && tools/setup.sh && rm -rf /root/.cache
ENV PATH=/psbn_mmdet/.venv/bin:${PATH}
CMD ["bash"]
